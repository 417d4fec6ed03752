"""What changed from one version's record to another's, in short sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.version_files import IndexEntry
from pipeline.version_inputs import LETTERS
from pipeline.version_names import Kind

_SHOWN = 60  # characters of a value
_ABSENT = object()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One sentence for each value that moved: "C: train.epochs 3 -> 5"; "key: …" for what is in the key but moves no segment."""
    sentences = []
    for letter, before, after in zip(LETTERS, old["segments"], new["segments"], strict=False):
        if before["digest"] != after["digest"]:
            sentences += _changed(letter, before["value"], after["value"])
    if new["kind"] == "run":
        sentences += [
            f"{role}: {old['lineage'][role]['name']} -> {part['name']}"
            for role, part in new["lineage"].items()
            if old["lineage"][role]["key"] != part["key"]
        ]
    own = [{name: value for name, value in record["beside"].items() if name not in new["lineage"]} for record in (old, new)]
    return sentences + _changed("key", *own)


def compared(record: Mapping[str, Any], earlier: Sequence[IndexEntry], read: Callable[[Kind, str], Mapping[str, Any]]) -> list[str]:
    """How a version differs from the last of the earlier ones, and from an older one where that shares more of it: a return to an
    old source is a change against the last version, and has its numbers from the older one."""
    if not earlier:
        return [f"the first {record['kind']} version"]
    last = earlier[-1]
    sentences = [f"compared with {last.name}{'' if last.status == 'done' else f' ({last.status})'}:"]
    sentences += differences(read(last.kind, last.id), record) or ["the same inputs"]
    if relative := nearest([segment["digest"] for segment in record["segments"]], earlier):
        sentences.append(f"and with {relative.name}, which shares more of it:")
        sentences += differences(read(relative.kind, relative.id), record) or ["the same inputs"]
    return sentences


def nearest(digests: Sequence[str], earlier: Sequence[IndexEntry]) -> IndexEntry | None:
    """The version that shares more leading segments with these digests than the last one does; of several the latest."""

    def shared(entry: IndexEntry) -> int:
        return _same_start(digests, entry.segments)

    best = max(earlier, key=lambda entry: (shared(entry), entry.id))
    return best if shared(best) > shared(earlier[-1]) else None


def _changed(letter: str, before: Any, after: Any) -> list[str]:
    old, new = _flat(before), _flat(after)
    return [
        f"{letter}: {name} " + " -> ".join(_shown(old.get(name, _ABSENT), new.get(name, _ABSENT)))
        for name in dict.fromkeys((*old, *new))
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested values under paths: dataset.ratings[0].label."""
    if isinstance(value, Mapping) and value:
        return {p: v for key, item in value.items() for p, v in _flat(item, f"{path}.{key}" if path else str(key)).items()}
    if isinstance(value, list) and value:
        return {p: v for n, item in enumerate(value) for p, v in _flat(item, f"{path}[{n}]").items()}
    return {path: value} if path else {}


def _shown(old: Any, new: Any) -> tuple[str, str]:
    """Both values, cut to where they differ when they are long."""
    texts = [_text(value) for value in (old, new)]
    start = max(0, _same_start(*texts) - 15) if max(map(len, texts)) > _SHOWN else 0
    first, second = (("…" if start else "") + text[start : start + _SHOWN] + ("…" if len(text) > start + _SHOWN else "") for text in texts)
    return first, second


def _same_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    unlike = (n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    return next(unlike, min(len(a), len(b)))


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    if isinstance(value, str) and value.startswith("sha256:"):
        return value[:15] + "…"
    return json.dumps(value, ensure_ascii=False)
