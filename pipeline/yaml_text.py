"""YAML that every parser reads alike: YAML 1.1 (PyYAML) and 1.2 (the Hub's server, Go, Rust, JavaScript).

They differ on plain scalars: `0899` is text to one and 899 to the other, `1_0`, `12:30`, `on` and `2.0` likewise. So a string is written
without quotes only when it can't be anything but a string.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ArtifactError
from pipeline.records import to_plain
from pipeline.store import write_text

_PLAIN = re.compile(r"[A-Za-z](?:[A-Za-z0-9_./-]| (?=[A-Za-z0-9]))*")
_WORDS_WITH_A_MEANING = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf", "infinity"})
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS_WITH_A_MEANING
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style=None if plain else '"')


_Dumper.add_representer(str, _string)
_Dumper.add_multi_representer(str, _string)


def dump(value: Any) -> str:
    """The value as YAML: keys in their order, line feeds, no anchors, unusual strings in double quotes.

    Raises:
        ValueError: NaN or an infinity, which other parsers read as null or not at all.
        TypeError: a type that YAML has no plain form for.
    """
    return yaml.dump(to_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=sys.maxsize)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ArtifactError: missing, not YAML, or not a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ArtifactError(
            f"{path}: damaged: {' '.join(str(error).split())[:200]}",
            hint="restore it from version control (`git checkout`), or resolve the merge",
        ) from error
    if not isinstance(tree, dict):
        raise ArtifactError(f"{path}: damaged: the top level is not a mapping", hint="restore it from version control (`git checkout`)")
    return tree


def write(path: Path, value: Any) -> bool:
    """Writes the value as YAML, atomically; False when the file held the same text already and was left alone."""
    text = dump(value)
    if path.is_file() and path.read_bytes() == text.encode("utf-8"):
        return False
    write_text(path, text)
    return True
