"""The privacy gate: what looks personal, or was copied from a record, in what is about to leave the machine.

It finds patterns and verbatim text. It is no proof that nothing personal is left: a name alone, say, has no pattern.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PrivacyError
from pipeline.privacy_patterns import matches
from pipeline.verbatim import VERBATIM_WORDS, WordRuns

_UNREAD = (".gguf", ".png")  # numbers and pictures drawn from figures; they hold no text of ours
_ESCAPED = (".yaml", ".json", ".md", "params")  # `\n` in these, and in a page's front matter, stands for a blank
_ESCAPES = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))")
_SHOWN_PLACES = 100


@dataclass(frozen=True, slots=True)
class Finding:
    file: str
    place: str  # "line 7", or "row 7, prompt"
    kind: str  # "e-mail address", "record text", …
    shown: str  # the start of it, never all
    digest: str = field(repr=False)  # of the whole of it, so that a review holds for exactly this

    def __str__(self) -> str:
        return f"{self.file}, {self.place}: {self.kind}: {self.shown}"


# --- scan ------------------------------------------------------------------------------------------------------------


def scan(
    files: Mapping[str, bytes | Path], records_texts: Iterable[str] | None = None, *, rows_allowed: bool = False
) -> tuple[Finding, ...]:
    """What should be looked at before these files go anywhere.

    Args:
        files: path -> content, as in `Publication.files`.
        records_texts: the records' own texts and rationales, without the instruction that all prompts share; see `record_texts`.
        rows_allowed: the files of rows (data/, outputs/, the model set) hold record text on purpose. Patterns are sought there too.
    """
    found: list[Finding] = []
    runs = WordRuns()
    places: list[tuple[str, str]] = []  # of each text that was given to `runs`
    for name, content in files.items():
        try:
            texts = list(_texts(name, content))
        except (UnicodeDecodeError, ValueError, OSError) as error:
            found.append(_finding(name, "whole file", "can't be read, so can't be checked", type(error).__name__, str(error)))
            continue
        exempt = rows_allowed and (name.startswith(("data/", "outputs/")) or name == "model_set_config.json")
        for place, text in texts:
            found += [_finding(name, place, kind, match, match) for kind, match in matches(text)]
            if not exempt and records_texts is not None:
                places.append((name, place))
                runs.add(_plain(text, name), joined=place.startswith("line"))
        runs.end()
    if records_texts is not None:
        for number, words in runs.found_in(records_texts):
            name, place = places[number]
            found.append(_finding(name, place, "record text", words, words))
    return tuple(sorted(found, key=lambda f: (f.file, _number(f.place), f.place, f.kind, f.shown)))


def record_texts(rows: Iterable[Mapping[str, Any]], instruction: str) -> Iterator[str]:
    """The texts that only a record has: the rows of formatted_dataset.csv without what identifies or rates them, their prompts
    without the instruction (`prompts.instruction`) that all share."""
    for row in rows:
        for name, value in row.items():
            if name == "prompt":
                yield str(value).removeprefix(instruction)
            elif name.endswith("rationale") or name.startswith("meta_"):
                yield str(value)


def _texts(name: str, content: bytes | Path) -> Iterator[tuple[str, str]]:
    """(place, text) of everything that is written in a file."""
    if name.endswith(_UNREAD):
        return
    if name.endswith(".parquet"):
        yield from _cells(content)
        return
    data = content.read_bytes() if isinstance(content, Path) else content
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        yield f"line {number}", line


def _cells(content: bytes | Path) -> Iterator[tuple[str, str]]:
    """A Parquet file's texts, each after its column's name: `dob` beside a date says what the date is."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.read_table(content if isinstance(content, Path) else pa.BufferReader(content))
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    for column in table.column_names:
        if pa.types.is_floating(table.schema.field(column).type):
            continue
        heading = re.sub(r"^(meta|rater)_|_", " ", column).strip()
        for number, value in enumerate(table.column(column).to_pylist(), start=1):
            if value is not None:
                yield f"row {number}, {column}", f"{heading}: {value if isinstance(value, str) else json.dumps(value, default=str)}"


def _plain(text: str, name: str) -> str:
    """A text as it was before it was escaped for its file."""
    if name.endswith(_ESCAPED):
        text = _ESCAPES.sub(lambda m: chr(int(m[1] or m[2], 16)) if m[1] or m[2] else " " if m[3] in "nrtabefv0N_LP" else m[3], text)
    return html.unescape(text)


def _finding(name: str, place: str, kind: str, text: str, whole: str) -> Finding:
    shown = text.strip()
    cut = shown[: max(1, min(6, len(shown) // 3))].rstrip()
    return Finding(name, place, kind, f"{cut}…", hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest())


def _number(place: str) -> int:
    found = re.search(r"\d+", place)
    return int(found[0]) if found else 0


# --- the gate --------------------------------------------------------------------------------------------------------


def review_code(findings: Sequence[Finding]) -> str:
    """A short code for exactly these findings. It costs time to compute, so that nobody guesses a phone number from it."""
    told = json.dumps(sorted([f.file, f.place, f.kind, f.digest] for f in findings)).encode()
    return hashlib.scrypt(told, salt=b"pipeline.privacy", n=2**14, r=8, p=1, dklen=6).hex()


def check(findings: Sequence[Finding], reviewed: str | None = None) -> None:
    """Lets a publication pass when nothing was found, or when a person has looked at exactly what was.

    Raises:
        PrivacyError: names every place, and the code that says that they were looked at.
    """
    if not findings:
        return
    code = review_code(findings)
    if reviewed is not None and reviewed.strip().lower() == code:
        return
    lines = [f"  - {finding}" for finding in findings[:_SHOWN_PLACES]]
    if len(findings) > _SHOWN_PLACES:
        rest = Counter(finding.file for finding in findings[_SHOWN_PLACES:])
        lines.append(f"  … and {rest.total()} more: {', '.join(f'{n} in {file}' for file, n in sorted(rest.items()))}")
    other = f" (the code {reviewed!r} is of other findings)" if reviewed else ""
    raise PrivacyError(
        f"nothing was published: {len(findings)} places look personal{other}\n" + "\n".join(lines),
        hint=f"take it out at its source and run again; if a person has looked at every place and none is personal, pass the code {code}",
    )


def check_repository(shareable: bool, environ: Mapping[str, str]) -> None:
    """Stops a workflow of GitHub Actions before it reads rows where everybody could read its log and artifacts.

    Raises:
        PrivacyError: the repository is public, or nothing says that it is private, and `dataset.shareable` is false.
    """
    if environ.get("GITHUB_ACTIONS") != "true" or shareable:
        return
    private = None
    try:
        event = json.loads(Path(environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
        private = event["repository"]["private"]
    except (KeyError, TypeError, ValueError, OSError):
        pass
    if private is not True:
        state = "is public" if private is False else "may be public: the event file does not say that it is private"
        raise PrivacyError(
            f"{environ.get('GITHUB_REPOSITORY') or 'this repository'} {state}, and the rows are not marked as shareable",
            hint="make the repository private, or set dataset.shareable: true if everybody may read the rows",
        )


__all__ = ["VERBATIM_WORDS", "Finding", "check", "check_repository", "record_texts", "review_code", "scan"]
