"""Prompts x engine -> outputs.jsonl: one line a record and system, appended and never rewritten, resumed row by row.

A line holds an Answer's fields, `generate_key` and `detail` (why a row failed). A row is done when record, system, prompt digest,
model digest and generate key are the ones asked for and its error is not `failed`; failed rows are tried again by the next run.
For each record and system the last line counts. So when an older line is the one asked for (a model that came back, say), it is
appended once more instead of being generated again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pipeline.config import GenerateConfig
from pipeline.errors import ArtifactError, DataError, EngineError
from pipeline.ports import Engine, Progress, quiet
from pipeline.prompts import parse_answer
from pipeline.records import Answer, Completion, Prompt, RatingScale, Record, fingerprint, to_plain
from pipeline.store import explained

ANSWERS_VERSION = 2  # part of every generate key: raise it when answers to the same question come out differently
AGAIN_ROWS = 50  # rows that a server is asked twice
SYNC_ROWS = 20  # rows that a power cut may cost

_FIELDS = tuple(field.name for field in dataclasses.fields(Answer))
Row = tuple[str, str]  # record_id, system


@dataclass(frozen=True)
class SystemRun:
    """One system: what it is asked and how its engine is opened, which happens only when answers are missing."""

    system: str
    prompts: Sequence[Prompt]
    model_digest: str
    open: Callable[[], Engine]


@dataclass(frozen=True, slots=True)
class SystemCounts:
    done: int  # answers made now
    resumed: int  # answers found in the file
    errors: Mapping[str, int]  # kind of error -> rows, of both
    seconds: float  # loading and generating
    output_tokens: int  # generated now


@dataclass(frozen=True, slots=True)
class InferenceCounts:
    systems: Mapping[str, SystemCounts]

    @property
    def done(self) -> int:
        return sum(counts.done for counts in self.systems.values())

    @property
    def resumed(self) -> int:
        return sum(counts.resumed for counts in self.systems.values())


def run_inference(
    systems: Sequence[SystemRun],
    outputs: Path,
    *,
    scale: RatingScale,
    generate: GenerateConfig,
    max_prompt_tokens: int,
    through: str = "embedded",
    progress: Progress = quiet,
) -> InferenceCounts:
    """Sees to it that `outputs` holds the current answer of every system to each of its prompts, one system after the other.
    `through` names the engine: answers of another one don't count.

    Raises:
        DataError: a record or a system twice.
        EngineError: an engine failed as a whole; the answers so far are kept.
        ArtifactError: `outputs` is damaged before its last line.
        OutputError: `outputs` can't be written.
    """
    _refuse_duplicates(systems)
    key = generate_key(scale, generate, max_prompt_tokens, through)
    counts: dict[str, SystemCounts] = {}
    with _OutputFile(outputs) as file:
        for run in systems:
            work = _Work(run, file, key, scale, generate, max_prompt_tokens, progress)
            counts[run.system] = work.run_missing()
    return InferenceCounts(counts)


def read_answers(outputs: Path, *, record_ids: Sequence[str] | None = None, systems: Sequence[str] | None = None) -> tuple[Answer, ...]:
    """The current answers: those of the first system in the order of `record_ids`, then of the next.

    Without `systems` or `record_ids`: all there are, in the order in which they first stand in the file.

    Raises:
        ArtifactError: no such file, or damaged.
    """
    current = {row: line for line in _lines(outputs, _read(outputs)) if (row := _row(line))}
    names = list(dict.fromkeys(system for _, system in current)) if systems is None else systems
    ids = list(dict.fromkeys(record_id for record_id, _ in current)) if record_ids is None else record_ids
    rows = [(record_id, system) for system in names for record_id in ids]
    return tuple(Answer(**{name: current[row][name] for name in _FIELDS}) for row in rows if row in current)


def given_answers(records: Sequence[Record]) -> tuple[Answer, ...]:
    """The opinions that stand in the table (copilot, raters) as answers, system after system. A record on which a system gave
    neither rating nor rationale has no answer; one with a rationale alone has an answer without a rating."""
    names = dict.fromkeys(name for record in records for name in record.opinions)
    return tuple(
        Answer(
            record_id=record.record_id,
            system=name,
            prompt_digest=fingerprint(record.prompt),
            response="",
            label=opinion.label,
            rationale=opinion.rationale,
            error=None if opinion.label is not None else "no_answer",
            finish="given",
            probabilities=None,
            prompt_tokens=0,
            output_tokens=0,
            seconds=0.0,
            engine="given",
            model_digest=None,
        )
        for name in names
        for record in records
        if (opinion := record.opinions.get(name)) is not None and (opinion.label, opinion.rationale) != (None, None)
    )


@dataclass(frozen=True, slots=True)
class Flips:
    """What changed when a system was asked again: `ratings` and `answers` of `rows`."""

    system: str
    rows: int
    ratings: int
    answers: int

    @property
    def words(self) -> str:
        """A sentence; equal answers are no promise, since a server's rows share work with whatever else it does."""
        who = self.system.replace("_", "-")
        return (
            f"Asked again, {who} gave another rating in {self.ratings} of {self.rows} rows, and another text in {self.answers}: "
            "how far one run differs from the next."
        )


def ask_again(
    run: SystemRun,
    outputs: Path,
    *,
    scale: RatingScale,
    generate: GenerateConfig,
    max_prompt_tokens: int,
    through: str = "embedded",
    progress: Progress = quiet,
) -> Flips | None:
    """Asks one system the first 50 of its prompts that have an answer once more and counts what differs, rows that fail now left out;
    None where none can be compared. `outputs` stays as it is.

    Raises:
        EngineError: the engine failed as a whole. ArtifactError: `outputs` is damaged.
    """
    asked = run.prompts[:AGAIN_ROWS]
    before = {
        a.record_id: a for a in read_answers(outputs, record_ids=[p.record_id for p in asked], systems=[run.system]) if a.error != "failed"
    }
    asked = [prompt for prompt in asked if prompt.record_id in before]
    ratings = answers = rows = compared = 0
    with run.open() as engine:
        for completion in engine.complete(asked, scale, generate, max_prompt_tokens=max_prompt_tokens):
            progress("inference", rows := rows + 1, len(asked), f"{run.system}, asked again")
            if completion.finish == "failed":
                continue
            compared += 1
            label, _, _ = parse_answer(completion.text, completion.finish, scale)
            old = before[completion.record_id]
            ratings += label != old.label
            answers += _whole(completion.text) != old.response
    return Flips(run.system, compared, ratings, answers) if compared else None


def generate_key(scale: RatingScale, generate: GenerateConfig, max_prompt_tokens: int, through: str = "embedded") -> str:
    """Fingerprint of how answers are asked for, besides prompt and model."""
    return fingerprint(ANSWERS_VERSION, scale, generate, max_prompt_tokens, *([] if through == "embedded" else [through]))


def prompt_digest(prompt: Prompt) -> str:
    return fingerprint(prompt.messages)


def _refuse_duplicates(systems: Sequence[SystemRun]) -> None:
    names = Counter(run.system for run in systems)
    problems = [f"the system {name!r} is there {count} times" for name, count in names.items() if count > 1]
    for run in systems:
        ids = Counter(prompt.record_id for prompt in run.prompts)
        problems += [f"{run.system}: the record id {record_id!r} is there {count} times" for record_id, count in ids.items() if count > 1]
    if problems:
        raise DataError("rows to answer", problems, hint="give every record an id of its own")


# --- one system ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    run: SystemRun
    file: _OutputFile
    key: str
    scale: RatingScale
    generate: GenerateConfig
    max_prompt_tokens: int
    progress: Progress

    def run_missing(self) -> SystemCounts:
        """Generates what the file lacks."""
        found = [line for prompt in self.run.prompts if (line := self._found(prompt)) is not None]
        have = {line["record_id"] for line in found}
        missing = [prompt for prompt in self.run.prompts if prompt.record_id not in have]
        errors = Counter(line["error"] for line in found if line["error"])
        tokens, started = 0, time.perf_counter()
        self._show(len(found))
        if missing:
            with self.run.open() as engine:
                for done, answer in enumerate(self._generated(engine, missing), start=1):
                    errors.update([answer.error] if answer.error else [])
                    tokens += answer.output_tokens
                    self._show(len(found) + done)
            self.file.sync()
        return SystemCounts(len(missing), len(found), dict(errors), time.perf_counter() - started, tokens)

    def _show(self, done: int) -> None:
        self.progress("inference", done, len(self.run.prompts), self.run.system)

    def _found(self, prompt: Prompt) -> Mapping[str, Any] | None:
        """The line that already answers this prompt, made the current one."""
        asked = (prompt.record_id, self.run.system, prompt_digest(prompt), self.run.model_digest, self.key)
        line = self.file.by_question.get(asked)
        if line is not None and self.file.current[asked[:2]] is not line:
            self.file.append(line)
        return line

    def _generated(self, engine: Engine, missing: Sequence[Prompt]) -> Iterator[Answer]:
        """Each new answer, after it was written."""
        waiting = {prompt.record_id: prompt for prompt in missing}
        completions = engine.complete(missing, self.scale, self.generate, max_prompt_tokens=self.max_prompt_tokens)
        try:
            for completion in completions:
                prompt = waiting.pop(completion.record_id, None)
                if prompt is None:
                    raise EngineError(f"{engine.name}: an answer to {completion.record_id!r}, which was not asked or answered before")
                answer = self._answer(completion, prompt, engine.name)
                self.file.append({**to_plain(answer), "generate_key": self.key, "detail": completion.error})
                yield answer
        finally:
            # an interrupt must not leave rows running behind
            end = getattr(completions, "close", None)
            if end is not None:
                end()
        if waiting:
            raise EngineError(
                f"{engine.name}: no answer for {len(waiting)} of {len(missing)} prompts", hint="run again: it goes on from here"
            )

    def _answer(self, completion: Completion, prompt: Prompt, engine: str) -> Answer:
        label, rationale, error = parse_answer(completion.text, completion.finish, self.scale)
        return Answer(
            record_id=completion.record_id,
            system=self.run.system,
            prompt_digest=prompt_digest(prompt),
            response=_whole(completion.text),
            label=label,
            rationale=None if rationale is None else _whole(rationale),
            error=error,
            finish=completion.finish,
            probabilities=completion.probabilities,
            prompt_tokens=completion.prompt_tokens,
            output_tokens=completion.output_tokens,
            seconds=completion.seconds,
            engine=engine,
            model_digest=self.run.model_digest,
        )


def _whole(text: str) -> str:
    """The text with half characters (a JSON escape such as \\ud83d alone), which UTF-8 can't carry, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


# --- the file --------------------------------------------------------------------------------------------------------


class _OutputFile:
    """outputs.jsonl, open for appending; a torn last line is cut off first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.current: dict[Row, Mapping[str, Any]] = {}  # the last line of each row
        self.by_question: dict[tuple[str, ...], Mapping[str, Any]] = {}  # lines that need not be made again
        self._handle: BinaryIO | None = None
        self._unsynced = 0

    def __enter__(self) -> _OutputFile:
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = self.path.read_bytes() if self.path.exists() else b""
        for line in _lines(self.path, data):
            self._remember(line)
        with explained(self.path):
            self._handle = self.path.open("ab")
            self._handle.truncate(data.rfind(b"\n") + 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            try:
                if error is None:
                    self.sync()
            finally:
                with explained(self.path):
                    self._handle.close()

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line through to the system, and to the disk every SYNC_ROWS."""
        assert self._handle is not None
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with explained(self.path):
            self._handle.write(text.encode("utf-8"))
            self._handle.flush()
        self._remember(line)
        self._unsynced += 1
        if self._unsynced >= SYNC_ROWS:
            self.sync()

    def sync(self) -> None:
        assert self._handle is not None
        if self._unsynced:
            with explained(self.path):
                os.fsync(self._handle.fileno())
            self._unsynced = 0

    def _remember(self, line: Mapping[str, Any]) -> None:
        self.current[_row(line)] = line
        question = (*_row(line), line["prompt_digest"], line["model_digest"], line["generate_key"])
        if line["error"] == "failed":
            self.by_question.pop(question, None)
        else:
            self.by_question[question] = line


def _row(line: Mapping[str, Any]) -> Row:
    return line["record_id"], line["system"]


def _read(outputs: Path) -> bytes:
    try:
        return outputs.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{outputs}: no such file", hint="run `pipeline infer`, which makes it") from None
    except OSError as error:
        raise ArtifactError(f"{outputs}: can't be read: {error.strerror}", hint="check the file's owner and rights") from error


def _lines(outputs: Path, data: bytes) -> Iterator[Mapping[str, Any]]:
    """The lines that were written to their end."""
    for number, text in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {*_FIELDS, "generate_key"} <= line.keys():
            raise ArtifactError(f"{outputs}: line {number} is damaged", hint="delete that line, or the file, and run again")
        yield line
