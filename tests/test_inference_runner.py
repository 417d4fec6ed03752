from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import inference_runner
from pipeline.config import GenerateConfig
from pipeline.errors import ArtifactError, DataError, EngineError, OutputError
from pipeline.inference_runner import InferenceCounts, SystemRun, given_answers, read_answers, run_inference
from pipeline.prompts import answer_text
from pipeline.records import Message, Opinion, Prompt, Rating, RatingScale, Record
from tests.fakes import FakeEngine

SCALE = RatingScale((Rating(0, "No"), Rating(-1, "Unknown", abstain=True), Rating(1, "Yes")))
GENERATE = GenerateConfig(max_tokens=160)
PROMPTS = tuple(Prompt(f"r{n}", (Message("user", f"text {n}"),)) for n in range(5))
IDS = [prompt.record_id for prompt in PROMPTS]


class Bench:
    """Runs systems on one outputs file and keeps the engines that were opened."""

    def __init__(self, outputs: Path) -> None:
        self.outputs, self.engines = outputs, list[FakeEngine]()

    def system(self, name: str = "base", prompts: tuple[Prompt, ...] = PROMPTS, digest: str = "sha256:one", **engine: Any) -> SystemRun:
        def open_engine() -> FakeEngine:
            self.engines.append(FakeEngine(digest, **engine))
            return self.engines[-1]

        return SystemRun(name, prompts, digest, open_engine)

    def run(self, *systems: SystemRun, generate: GenerateConfig = GENERATE, max_prompt_tokens: int = 100) -> InferenceCounts:
        return run_inference(systems, self.outputs, scale=SCALE, generate=generate, max_prompt_tokens=max_prompt_tokens)

    def asked(self) -> list[str]:
        return [record_id for engine in self.engines for record_id in engine.asked]

    def lines(self) -> list[Mapping[str, Any]]:
        return [json.loads(line) for line in self.outputs.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "out" / "outputs.jsonl")


def test_every_system_answers_every_row(bench: Bench) -> None:
    shown: list[tuple[str, int, int, str]] = []
    counts = run_inference(
        [bench.system("base"), bench.system("fine_tuned", digest="sha256:two")],
        bench.outputs,
        scale=SCALE,
        generate=GENERATE,
        max_prompt_tokens=100,
        progress=lambda stage, done, total, note="": shown.append((stage, done, total, note)),
    )
    assert (counts.done, counts.resumed) == (10, 0)
    assert counts.systems["base"].errors == {}
    assert counts.systems["base"].output_tokens > 0
    assert shown[-1] == ("inference", 5, 5, "fine_tuned")
    assert all(engine.closed == 1 for engine in bench.engines)
    answers = read_answers(bench.outputs, record_ids=IDS[::-1], systems=["fine_tuned", "base"])
    assert [(a.system, a.record_id) for a in answers] == [(s, r) for s in ("fine_tuned", "base") for r in IDS[::-1]]
    first = answers[0]
    assert first.label in SCALE.labels
    assert first.rationale == "because it says so"
    assert (first.engine, first.model_digest, first.finish, first.error) == ("embedded", "sha256:two", "stop", None)
    assert first.probabilities is not None
    assert sum(first.probabilities.values()) == pytest.approx(1)


def test_nothing_missing_opens_nothing_and_writes_nothing(bench: Bench) -> None:
    bench.run(bench.system())
    before = bench.outputs.read_bytes()
    counts = bench.run(bench.system())
    assert (counts.done, counts.resumed, len(bench.engines)) == (0, 5, 1)
    assert bench.outputs.read_bytes() == before


@pytest.mark.parametrize("death", [KeyboardInterrupt(), EngineError("the engine died")])
def test_a_run_that_dies_goes_on_where_it_stopped(bench: Bench, death: BaseException) -> None:
    with pytest.raises(type(death)):
        bench.run(bench.system(dies_after=(3, death)))
    assert len(bench.lines()) == 3
    assert bench.engines[0].closed == 1
    counts = bench.run(bench.system())
    assert (counts.done, counts.resumed) == (2, 3)
    assert bench.asked() == IDS


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": (Prompt("r0", (Message("user", "another text"),)), *PROMPTS[1:])},
        {"prompts": (Prompt("r0", (Message("system", "text 0"),)), *PROMPTS[1:])},
    ],
)
def test_a_changed_prompt_is_asked_again(bench: Bench, change: dict[str, Any]) -> None:
    bench.run(bench.system())
    counts = bench.run(bench.system(**change))
    assert (counts.done, counts.resumed) == (1, 4)
    assert bench.engines[1].asked == ["r0"]


def test_another_model_or_setting_or_scale_is_asked_again(bench: Bench) -> None:
    bench.run(bench.system())
    assert bench.run(bench.system(digest="sha256:two")).done == 5
    assert bench.run(bench.system(), generate=replace(GENERATE, max_tokens=150)).done == 5
    assert bench.run(bench.system(), generate=replace(GENERATE, temperature=0.5)).done == 5
    assert bench.run(bench.system(), max_prompt_tokens=99).done == 5
    other = replace(SCALE, ratings=SCALE.ratings[:2])
    assert run_inference([bench.system()], bench.outputs, scale=other, generate=GENERATE, max_prompt_tokens=100).done == 5


def test_a_model_that_comes_back_is_current_without_being_asked(bench: Bench) -> None:
    bench.run(bench.system(digest="sha256:one"))
    bench.run(bench.system(digest="sha256:two"))
    counts = bench.run(bench.system(digest="sha256:one"))
    assert (counts.done, counts.resumed, len(bench.engines)) == (0, 5, 2)
    assert {answer.model_digest for answer in read_answers(bench.outputs)} == {"sha256:one"}
    assert bench.run(bench.system(digest="sha256:one")).resumed == 5
    assert len(bench.lines()) == 15


@pytest.mark.parametrize("torn", [b'{"record_id": "r9", "sys', b'{"record_id": "r9"}', b"\x00\x00\x00", '{"x": "ü"}'.encode()[:-3]])
def test_a_torn_last_line_is_cut_off(bench: Bench, torn: bytes) -> None:
    bench.run(bench.system(prompts=PROMPTS[:3]))
    whole = bench.outputs.read_bytes()
    bench.outputs.write_bytes(whole + torn)
    assert len(read_answers(bench.outputs)) == 3  # reading does not need the repair
    counts = bench.run(bench.system())
    assert (counts.done, counts.resumed) == (2, 3)
    assert bench.outputs.read_bytes().startswith(whole)
    assert len(bench.lines()) == 5


def test_cut_at_any_byte_the_file_is_repaired(bench: Bench) -> None:
    bench.run(bench.system())
    whole = bench.outputs.read_bytes()
    for length in range(0, len(whole), 37):
        bench.outputs.write_bytes(whole[:length])
        counts = bench.run(bench.system())
        assert counts.resumed == whole[:length].count(b"\n")
        assert len(read_answers(bench.outputs, record_ids=IDS)) == 5


def test_damage_in_the_middle_is_named(bench: Bench) -> None:
    bench.run(bench.system())
    lines = bench.outputs.read_bytes().split(b"\n")
    bench.outputs.write_bytes(b"\n".join([lines[0], b"{not json", *lines[2:]]))
    before = bench.outputs.read_bytes()
    for call in (lambda: bench.run(bench.system()), lambda: read_answers(bench.outputs)):
        with pytest.raises(ArtifactError, match="line 2 is damaged"):
            call()
    assert bench.outputs.read_bytes() == before


def test_failed_rows_are_tried_again_and_counted(bench: Bench) -> None:
    counts = bench.run(bench.system(fails=frozenset({"r1", "r3"})))
    assert counts.systems["base"].errors == {"failed": 2}
    assert {line["record_id"]: line["detail"] for line in bench.lines() if line["detail"]} == dict.fromkeys(
        ["r1", "r3"], "the fake was told to fail"
    )
    counts = bench.run(bench.system(fails=frozenset({"r3"})))
    assert (counts.done, counts.resumed) == (2, 3)
    assert counts.systems["base"].errors == {"failed": 1}
    assert [answer.error for answer in read_answers(bench.outputs, record_ids=IDS)] == [None, None, None, "failed", None]
    assert bench.run(bench.system()).done == 1
    assert all(answer.error is None for answer in read_answers(bench.outputs))


def test_long_rows_and_unusable_answers_are_counted_and_not_tried_again(bench: Bench) -> None:
    long = Prompt("long", (Message("user", "x" * 500),))
    texts = {"r0": "I think Yes", "r1": '{"rating": "Maybe", "rationale": "x"}', "r2": answer_text("Yes", "b")}
    prompts = (*PROMPTS[:3], long)
    counts = bench.run(bench.system(prompts=prompts, respond=lambda prompt: texts[prompt.record_id]))
    assert counts.systems["base"].errors == {"invalid_json": 1, "unknown_label": 1, "too_long": 1}
    again = bench.run(bench.system(prompts=prompts))
    assert (again.done, again.resumed) == (0, 4)
    assert again.systems["base"].errors == counts.systems["base"].errors


def test_a_response_that_utf8_cannot_carry_is_kept_readable(bench: Bench) -> None:
    text = '{"rating": "Yes", "rationale": "half \\ud83d a\u2028b"}'
    bench.run(bench.system(prompts=PROMPTS[:1], respond=lambda _: text))
    [answer] = read_answers(bench.outputs)
    assert (answer.response, answer.rationale) == (text, "half ? a\u2028b")


def test_duplicates_are_refused_before_anything_is_opened(bench: Bench) -> None:
    with pytest.raises(DataError, match=r"(?s)'base' is there 2 times.*'r0' is there 2 times"):
        bench.run(bench.system(), bench.system(prompts=(*PROMPTS, PROMPTS[0])))
    assert bench.engines == []
    assert not bench.outputs.exists()


def test_an_engine_that_leaves_rows_out_is_an_error(bench: Bench) -> None:
    class Lazy(FakeEngine):
        def complete(self, prompts: Any, *args: Any, **kw: Any) -> Any:
            return super().complete(prompts[:2], *args, **kw)

    with pytest.raises(EngineError, match="no answer for 3 of 5"):
        bench.run(SystemRun("base", PROMPTS, "d", Lazy))
    assert len(bench.lines()) == 2


def test_a_full_disk_is_explained_and_what_was_written_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(inference_runner, "SYNC_ROWS", 3)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        bench.run(bench.system())
    monkeypatch.undo()
    assert bench.run(bench.system()).resumed == 3


def test_a_folder_that_cannot_be_one_is_explained(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="can't be written"):
        Bench(tmp_path / "out" / "outputs.jsonl").run()


def test_no_file_to_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_answers(tmp_path / "outputs.jsonl")


def test_given_answers_are_copilot_and_raters() -> None:
    def record(n: int, **opinions: Opinion) -> Record:
        return Record(f"r{n}", "g", "test", f"text {n}", "Yes", "why", opinions)

    answers = given_answers(
        [
            record(0, copilot=Opinion("Yes", "short"), second=Opinion("No", None)),
            record(1, copilot=Opinion(None, None), second=Opinion(None, "can't say")),
            record(2, second=Opinion("Unknown", "x")),
        ]
    )
    assert [(a.system, a.record_id, a.label, a.error) for a in answers] == [
        ("copilot", "r0", "Yes", None),
        ("second", "r0", "No", None),
        ("second", "r1", None, "no_answer"),
        ("second", "r2", "Unknown", None),
    ]
    assert {(a.engine, a.finish, a.model_digest, a.probabilities) for a in answers} == {("given", "given", None, None)}
