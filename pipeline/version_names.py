"""Names of versions: `{ID}-{train|valid|test}-A.B.C.D`, `{ID}-model-A.B.C.D`, `{ID}-model-A.B.C.D-data-E.F.G.H`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from pipeline.errors import UserError
from pipeline.records import SPLITS, Split

Kind = Literal["dataset", "model", "run"]
KINDS: tuple[Kind, ...] = ("dataset", "model", "run")
Version = tuple[int, int, int, int]
LAST_ID = 9999

_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_VERSION = rf"{_NUMBER}(?:\.{_NUMBER}){{3}}"
_NAME = re.compile(rf"(?P<id>[0-9]{{4}})-(?:(?P<split>train|valid|test)|model)-(?P<version>{_VERSION})(?:-data-(?P<data>{_VERSION}))?")


@dataclass(frozen=True, slots=True)
class VersionName:
    """One name. `split` is given for a dataset only, `data` (the dataset's numbers) for a run only."""

    id: str
    kind: Kind
    version: Version
    split: Split | None = None
    data: Version | None = None

    def __str__(self) -> str:
        middle = self.split if self.kind == "dataset" else "model"
        tail = f"-data-{format_version(self.data)}" if self.data else ""
        return f"{self.id}-{middle}-{format_version(self.version)}{tail}"

    @property
    def order(self) -> tuple[tuple[int, ...], ...]:
        """Sorts names of one kind by their numbers (1.0.10.0 after 1.0.9.0), then by ID, then train, valid, test."""
        return self.version, self.data or (), (int(self.id), SPLITS.index(self.split) if self.split else 0)


def parse_name(name: str) -> VersionName:
    """
    Raises:
        UserError: not a version name; components have no leading zeros, the ID has four digits.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["split"] and match["data"]):
        raise UserError(
            f"{name!r} is not a version name", hint="write 0001-train-1.0.0.0, 0001-model-1.0.0.0 or 0001-model-1.0.0.0-data-1.0.0.0"
        )
    kind: Kind = "dataset" if match["split"] else "run" if match["data"] else "model"
    data = parse_version(match["data"]) if match["data"] else None
    return VersionName(match["id"], kind, parse_version(match["version"]), cast(Split | None, match["split"]), data)


def is_name(text: str) -> bool:
    match = _NAME.fullmatch(text)
    return match is not None and not (match["split"] and match["data"])


def names_replaced(text: str, renamed: Mapping[str, str]) -> str:
    """The text with every version name in it that has another name now replaced; a run's name is one name, not a model's and a tail."""
    return re.sub(rf"(?<![\w.-]){_NAME.pattern}(?![\w-]|\.[0-9])", lambda match: renamed.get(match[0], match[0]), text)


def parse_version(text: str) -> Version:
    """
    Raises:
        UserError: not four numbers without leading zeros, joined by dots.
    """
    if re.fullmatch(_VERSION, text) is None:
        raise UserError(f"{text!r} is not a version", hint="write four numbers without leading zeros: 1.0.0.0")
    a, b, c, d = (int(number) for number in text.split("."))
    return a, b, c, d


def format_version(version: Version) -> str:
    return ".".join(str(number) for number in version)


def names_of(kind: Kind, id: str, version: Version, data: Version | None = None) -> tuple[str, ...]:
    """The names that one version carries: three for a dataset, one for the others."""
    if kind == "dataset":
        return tuple(str(VersionName(id, kind, version, split)) for split in SPLITS)
    return (str(VersionName(id, kind, version, data=data)),)


def next_id(kind: Kind, taken: Iterable[str]) -> str:
    """The ID after the highest one ever taken, gaps and failed versions included.

    Raises:
        UserError: 9999 is taken.
    """
    number = max((int(id) for id in taken), default=0) + 1
    if number > LAST_ID:
        raise UserError(
            f"no ID is left for a new {kind} version: {LAST_ID} was the last of four digits",
            hint="start a new project: another `project` name and an empty metadata folder",
        )
    return f"{number:04d}"
