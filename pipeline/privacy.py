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
from pipeline.privacy_patterns import matches, matches_in_lines, normal
from pipeline.verbatim import VERBATIM_WORDS, WordRuns, words_of

_UNREAD = (".gguf", ".png")  # numbers and pictures drawn from figures; they hold no text of ours
_ESCAPED = (".yaml", ".yml", ".json", ".jsonl", ".md", "params")  # `\n` in these, and in a page's front matter, stands for a blank
_ESCAPES = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U(00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})|(.))")
_SHOWN_PLACES = 100
_PRIVATE = "PIPELINE_PRIVATE_REPOSITORY"


@dataclass(frozen=True, slots=True)
class Finding:
    file: str
    place: str  # "line 7", or "row 7, prompt"
    kind: str  # "e-mail address", "record text", …
    shown: str  # the start of it, never all
    digest: str = field(repr=False)  # of the whole of it, so that a review holds for exactly this
    length: int = 0  # of the whole of it, in characters; 0 where it is no text of the file

    def __str__(self) -> str:
        return self.told()

    def told(self, *, public: bool = False) -> str:
        """One line about it; where everybody can read the line, without a character of what was found."""
        what = self.shown if not public else f"{self.length} characters" if self.length else ""
        return ": ".join(filter(None, (f"{self.file}, {self.place}", self.kind, what)))


# --- scan ------------------------------------------------------------------------------------------------------------


def scan(
    files: Mapping[str, bytes | Path],
    records_texts: Iterable[str] | None = None,
    *,
    rows_allowed: bool = False,
    allowed: Iterable[str] = (),
    records_missing: str | None = None,
) -> tuple[Finding, ...]:
    """What should be looked at before these files go anywhere.

    Args:
        files: path -> content, as in `Publication.files`.
        records_texts: the records' own texts and rationales, without the instruction that all prompts share; see `record_texts`.
        rows_allowed: the files of rows (data/, outputs/, the model set) hold record text on purpose. Patterns are sought there too.
        allowed: texts that may go, such as the team's own address: what is found and is the whole of one is no finding.
        records_missing: why the records could not be compared. It is a finding then, since nobody knows what was copied.
    """
    found: list[Finding] = []
    may_go = {form for text in allowed for form in (_same(text), " ".join(words_of(text)))}
    runs = WordRuns()
    places: list[tuple[str, str]] = []  # of each text that was given to `runs`
    for name, content in files.items():
        try:
            texts = list(_texts(name, content))
        except (UnicodeDecodeError, ValueError, OSError) as error:
            found.append(_unread(name, content, error))
            continue
        exempt = rows_allowed and (name.startswith(("data/", "outputs/")) or name == "model_set_config.json")
        for number, kind, match in _matches(name, [text for _, text in texts]):
            if _same(match) not in may_go:
                found.append(_finding(name, texts[number][0], kind, match))
        for place, text in texts if not exempt and records_texts is not None else ():
            places.append((name, place))
            runs.add(text, joined=place.startswith("line"))
        runs.end()
    if records_texts is not None:
        for number, words in runs.found_in(records_texts):
            if words not in may_go:
                found.append(_finding(*places[number], "record text", words))
    if records_missing is not None:
        found.append(Finding("all files", "-", "not compared with the records", records_missing, _digest(records_missing)))
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


def _matches(name: str, texts: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(index of the text, kind, what matched)."""
    if not name.endswith(".parquet"):
        return matches_in_lines(texts)
    return ((number, kind, match) for number, text in enumerate(texts) for kind, match in matches(text))


def _texts(name: str, content: bytes | Path) -> Iterator[tuple[str, str]]:
    """(place, text) of everything that is written in a file, as it was before it was escaped for its file."""
    if name.endswith(_UNREAD):
        return
    if name.endswith(".parquet"):
        yield from _cells(content)
        return
    data = content.read_bytes() if isinstance(content, Path) else content
    lines = enumerate(data.decode("utf-8").splitlines(), start=1)
    for number, line in lines:
        # YAML: a backslash at the end joins two lines without a blank
        while name.endswith((".yaml", ".yml")) and (len(line) - len(line.rstrip("\\"))) % 2 and (following := next(lines, None)):
            line = line[:-1] + following[1].lstrip()
        yield f"line {number}", html.unescape(_unescaped(line) if name.endswith(_ESCAPED) else line)


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
                text = value if isinstance(value, str) else _unescaped(json.dumps(value, default=str))
                yield f"row {number}, {column}", f"{heading}: {html.unescape(text)}"


def _unescaped(text: str) -> str:
    """A text without the escapes of YAML, JSON and Markdown."""

    def character(escape: re.Match[str]) -> str:
        code = escape[1] or escape[2] or escape[3]
        return chr(int(code, 16)) if code else " " if escape[4] in "nrtabefv0N_LP" else escape[4]

    return _ESCAPES.sub(character, text)


def _same(text: str) -> str:
    """What two texts share that differ in case, blanks and what does not show only."""
    return " ".join(normal(html.unescape(text)).casefold().split())


def _finding(name: str, place: str, kind: str, text: str) -> Finding:
    shown = text.strip()
    cut = shown[: max(1, min(6, len(shown) // 3))].rstrip()
    return Finding(name, place, kind, f"{cut}…", _digest(text), len(text))


def _unread(name: str, content: bytes | Path, error: Exception) -> Finding:
    """A review of it holds for these bytes, where there are any."""
    try:
        data = content.read_bytes() if isinstance(content, Path) else content
    except OSError:
        data = str(error).encode()
    return Finding(name, "whole file", "can't be read, so can't be checked", type(error).__name__, _digest(data))


def _digest(whole: str | bytes) -> str:
    return hashlib.sha256(whole if isinstance(whole, bytes) else whole.encode("utf-8", "replace")).hexdigest()


def _number(place: str) -> int:
    found = re.search(r"\d+", place)
    return int(found[0]) if found else 0


# --- the gate --------------------------------------------------------------------------------------------------------


def review_code(findings: Sequence[Finding]) -> str:
    """A short code for exactly these findings, wherever in their files they stand: a line that comes before them changes nothing.
    It costs time to compute, so that nobody guesses a phone number from it."""
    told = json.dumps(sorted([f.file, f.kind, f.digest] for f in findings)).encode()
    return hashlib.scrypt(told, salt=b"pipeline.privacy", n=2**14, r=8, p=1, dklen=6).hex()


def check(findings: Sequence[Finding], reviewed: str | None = None, *, public: bool = False) -> None:
    """Lets a publication pass when nothing was found, or when a person has looked at exactly what was.

    Args:
        public: everybody can read the message, as in the log of a public repository: it shows nothing of what was found.

    Raises:
        PrivacyError: names every place, and the code that says that they were looked at.
    """
    if not findings:
        return
    code = review_code(findings)
    if reviewed is not None and reviewed.strip().lower() == code:
        return
    lines = [f"  - {finding.told(public=public)}" for finding in findings[:_SHOWN_PLACES]]
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
    private = _is_private(environ)
    if private is not True:
        state = "is public" if private is False else "may be public: nothing says that it is private"
        raise PrivacyError(
            f"{environ.get('GITHUB_REPOSITORY') or 'this repository'} {state}, and the rows are not marked as shareable",
            hint="make the repository private, or set dataset.shareable: true if everybody may read the rows"
            + (f"; a container without the file of the event reads {_PRIVATE}" if private is None else ""),
        )


def _is_private(environ: Mapping[str, str]) -> bool | None:
    """What the file of the event says or, in a container that lacks it, what the workflow handed on."""
    try:
        event = Path(environ.get("GITHUB_EVENT_PATH", ""))
        if not event.is_file():
            return {"true": True, "false": False}.get(environ.get(_PRIVATE, ""))
        private = json.loads(event.read_text(encoding="utf-8"))["repository"]["private"]
    except (KeyError, TypeError, ValueError, OSError):
        return None
    return private if isinstance(private, bool) else None


__all__ = ["VERBATIM_WORDS", "Finding", "check", "check_repository", "record_texts", "review_code", "scan"]
