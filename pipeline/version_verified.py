"""What an earlier `verify` found good, in a file of the output folder: derived, of this machine, never committed, safe to delete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import OutputError
from pipeline.store import write_text
from pipeline.version_facts import Facts
from pipeline.version_files import IndexEntry, format_line, parse_line

RULES = 1  # raise it when a record that was found good might not be any more: what was found is then forgotten
_FRESH_NS = 2_000_000_000  # a file system's clock may be this coarse: what changed this lately may change again unseen


class Stamp(NamedTuple):
    """What a file's status says of its content; the change time can't be set back as the modification time can."""

    size: int
    mtime_ns: int
    ctime_ns: int


class Found(NamedTuple):
    stamp: Stamp
    digest: str  # SHA-256 of the bytes
    facts: Facts


def stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def digest_of(path: Path) -> str | None:
    """SHA-256 of a small file; None when it can't be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


class Verified:
    """Records found good, by file name. `cache` None: nothing is known and nothing is kept.

    The cache is text: the rules' number, then a line a record, its fields between tabs, the last one the line that the index should have.
    """

    def __init__(self, folder: Path, cache: Path | None, index: Mapping[str, IndexEntry], *, forget: bool = False) -> None:
        """
        Args:
            folder: of the records.
            index: lines of the index and what they say, so that none is read twice.
            forget: start with nothing known.
        """
        self._folder, self._cache, self._started = folder, cache, time.time_ns()
        self._before = _read(cache, index) if cache and not forget else {}
        self._now: dict[str, Found] = {}

    def facts(self, name: str, stamp: Stamp) -> Facts | None:
        """The facts of a record that was found good and has the same bytes still: by its status, else by its digest."""
        found = self._before.get(name)
        if found is None or found.stamp.size != stamp.size:
            return None
        if found.stamp != stamp:
            if digest_of(self._folder / name) != found.digest:
                return None
            found = found._replace(stamp=self._sure(stamp))
        self._now[name] = found
        return found.facts

    def keep(self, name: str, stamp: Stamp, digest: str, facts: Facts) -> None:
        self._now[name] = Found(self._sure(stamp), digest, facts)

    def save(self) -> None:
        """Writes what is known now, when that is not what was known. A folder that can't be written is no problem: more is read again."""
        if self._cache is None or self._now == self._before:
            return
        lines = [f"{RULES}\n"]
        for name, (stamp, digest, facts) in self._now.items():
            fields = (name, *map(str, stamp), digest, json.dumps(facts.lineage), format_line(facts.entry))
            lines.append("\t".join(fields) + "\n")
        with contextlib.suppress(OutputError):
            write_text(self._cache, "".join(lines))

    def _sure(self, stamp: Stamp) -> Stamp:
        """A file that may still change within the same tick of the clock gets a time that no file has: next time its digest decides."""
        return stamp if max(stamp.mtime_ns, stamp.ctime_ns) < self._started - _FRESH_NS else stamp._replace(mtime_ns=-1)


def _read(path: Path, index: Mapping[str, IndexEntry]) -> dict[str, Found]:
    """Empty when the file is missing, damaged, or of other rules."""
    found: dict[str, Found] = {}
    try:
        rules, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if rules != str(RULES):
            return {}
        for text in lines:
            name, size, mtime, ctime, digest, lineage, line = text.split("\t")
            entry = index.get(line) or parse_line(line)
            numbers = tuple(map(int, entry.version.split("."))) if entry.segments else ()
            parts = tuple(map(tuple, json.loads(lineage)))
            found[name] = Found(Stamp(int(size), int(mtime), int(ctime)), digest, Facts(entry, numbers, parts))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found
