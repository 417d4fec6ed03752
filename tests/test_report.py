"""The report as its readers meet it: the figures, the escaping, what is left out of summary.md."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.records import (
    INVALID,
    Answer,
    Comparison,
    DataQuality,
    DroppedRow,
    EpochFigures,
    Estimate,
    Evaluation,
    GateResult,
    ModelFacts,
    Opinion,
    RatingScores,
    RationaleScore,
    Record,
    SplitQuality,
    SystemScores,
    TrainingResult,
)
from pipeline.report import ReportData, render_html, render_summary

LABELS = ("Does Not Match", "Unknown", "Match")
SKILL = {"base": 0.36, "fine_tuned": 0.71, "model_set": 0.47, "copilot": 0.66, "second_rater": 0.79}
GIVEN = {"copilot", "second_rater"}
INSTRUCTION = (
    "Rate the record below as an expert would for how well it fits the topic. Topic: respiratory infections.\n"
    'Answer with one JSON object: "rating" is one of "Does Not Match", "Unknown", "Match"; "rationale" says why in one or two sentences.'
)
NOTE = "pt c/o cough fever x3d sob on exertion denies chest pain hx copd sats 94 ra wheeze bilat no recent travel productive sputum"
WORDS = NOTE.split(" ")
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "\"quoted\" 'single' & <b>bold</b> &amp;",
    "null",
    "",
    "NaN",
    "{{data}}",
    "\u2028\u2029 separators",
    "\u202ereversed",
    "مرحبا بالعالم",
    "x" * 5000,
    "👩‍⚕️🫁",
    "\ud800 lone",
    "\x00\x1b[31m",
    "=HYPERLINK(1)",
    "a|b`c`[l](javascript:x)",
)


def wilson(k: int, n: int) -> Estimate:
    if not n:
        return Estimate(None)
    p, z = k / n, 1.96
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return Estimate(p, middle - half, middle + half, "wilson", n)


def make_records(count: int, rng: random.Random) -> list[Record]:
    records = []
    for n in range(count):
        label = rng.choices(LABELS, (5, 2, 3))[0]
        text = " ".join(rng.choices(WORDS, k=rng.randint(20, 260)))
        prompt = f"{INSTRUCTION}\n\nChief complaint: {text[:60]}\nTriage note: {text}"
        rationale = f"The note says {' '.join(rng.choices(WORDS, k=12))}, which is read as {label.lower()}."
        records.append(Record(f"r{n:04d}", f"day-{n // 9}", "test", prompt, label, rationale, {"copilot": Opinion("Match", None)}))
    return records


def make_answers(records: list[Record], rng: random.Random) -> list[Answer]:
    answers = []
    for record in records:
        for system, skill in SKILL.items():
            if system in GIVEN and rng.random() < 0.2:
                continue
            label: str | None = record.label if rng.random() < skill else rng.choice([x for x in LABELS if x != record.label])
            error: Any = None
            if system == "base" and rng.random() < 0.06:
                label, error = None, rng.choice(["invalid_json", "unknown_label", "cut"])
            sure = rng.uniform(0.4, 0.99)
            chances = None if system in GIVEN else {x: sure if x == label else (1 - sure) / 2 for x in LABELS}
            rationale = None if error else " ".join(rng.choices(WORDS, k=18)).capitalize() + "."
            response = '{"rating": "Perhaps' if error else "{}"
            finish = "given" if system in GIVEN else "length" if rng.random() < 0.02 else "stop"
            answers.append(
                Answer(
                    record.record_id,
                    system,
                    "sha256:0",
                    response,
                    label,
                    rationale,
                    error,
                    finish,
                    chances,
                    380,
                    41,
                    0.7,
                    "given" if system in GIVEN else "embedded",
                    None,
                )
            )
    return answers


def score(system: str, records: list[Record], answers: list[Answer], constant: str | None = None) -> SystemScores:
    said = {a.record_id: a.label for a in answers if a.system == system} if constant is None else {r.record_id: constant for r in records}
    rows = [(r.label, said[r.record_id]) for r in records if r.record_id in said]
    confusion = tuple(tuple(sum(pair == (gold, label) for pair in rows) for label in (*LABELS, None)) for gold in LABELS)
    right, n = sum(confusion[k][k] for k in range(3)), len(rows)
    per_rating = {}
    for k, label in enumerate(LABELS):
        support, named = sum(confusion[k]), sum(row[k] for row in confusion)
        precision, recall = wilson(confusion[k][k], named), wilson(confusion[k][k], support)
        f1 = Estimate(2 * confusion[k][k] / (support + named), 0.3, 0.9, "bootstrap", n) if support + named else Estimate(None)
        per_rating[label] = RatingScores(precision, recall, f1, support)
    invalid = sum(row[3] for row in confusion)
    model, baseline = system not in GIVEN, constant is not None
    accuracy = wilson(right, n)
    near = dataclasses.replace(
        accuracy, value=(accuracy.value or 0) * 0.93, low=(accuracy.low or 0) * 0.9, high=(accuracy.high or 0) * 0.95
    )
    kappa = Estimate(-0.012 if baseline else 0.41, -0.03 if baseline else 0.35, 0.47, "bootstrap", n)
    rationale = (
        ()
        if baseline
        else tuple(
            RationaleScore(m, Estimate(0.2 + 0.05 * k, 0.19 + 0.05 * k, 0.22 + 0.05 * k, "bootstrap", n - invalid), invalid)
            for k, m in enumerate(("rouge", "chrf", "string_similarity", "semantic_similarity"))
        )
    )
    return SystemScores(
        system=system,
        kind="baseline" if baseline else "model" if model else "given",
        n=n,
        n_invalid=invalid,
        errors={"invalid_json": invalid} if invalid else {},
        accuracy=accuracy,
        balanced_accuracy=near,
        macro_f1=near,
        kappa=kappa,
        quadratic_kappa=Estimate(None) if baseline else kappa,
        decided_accuracy=accuracy,
        abstention_rate=0.18,
        per_rating=per_rating,
        confusion=confusion,
        rationale=rationale,
        brier=Estimate(0.41, 0.38, 0.44) if model and not baseline else None,
        calibration_error=Estimate(0.087, 0.06, 0.11) if model and not baseline else None,
        mean_seconds=0.71 if model and not baseline else None,
        mean_output_tokens=41.2 if model and not baseline else None,
    )


def compare(a: SystemScores, b: SystemScores) -> Comparison:
    d = (a.accuracy.value or 0) - (b.accuracy.value or 0)
    verdict: Any = "better" if d > 0.05 else "worse" if d < -0.05 else "not decided"
    words = (
        f"{a.system} is {verdict} than {b.system}: {d * 100:+.1f} points"
        if verdict != "not decided"
        else ("not decided at this sample size; a difference under 4.6 points would rarely be seen")
    )
    return Comparison(
        a.system,
        b.system,
        min(a.n, b.n),
        Estimate(d, d - 0.045, d + 0.045, "bootstrap", a.n),
        214,
        61,
        0.0000002 if abs(d) > 0.05 else 0.31,
        0.000002 if abs(d) > 0.05 else 0.62,
        0.046,
        verdict,
        words,
    )


def make_data(count: int = 600, **changes: Any) -> ReportData:
    rng = random.Random(7)
    records = make_records(count, rng)
    answers = make_answers(records, rng)
    systems = [score(s, records, answers) for s in SKILL] + [score("majority", records, [], LABELS[0])]
    named = {s.system: s for s in systems}
    pairs = [
        ("fine_tuned", "base"),
        ("fine_tuned", "majority"),
        ("model_set", "base"),
        ("fine_tuned", "model_set"),
        ("fine_tuned", "copilot"),
        ("fine_tuned", "second_rater"),
        ("copilot", "second_rater"),
    ]
    evaluation = Evaluation(
        "test",
        LABELS,
        True,
        "fine_tuned",
        tuple(systems),
        tuple(compare(named[a], named[b]) for a, b in pairs),
        (
            GateResult("fine_tuned.accuracy", "passed", "0.705 is at least 0.6"),
            GateResult("fine_tuned.accuracy - copilot.accuracy", "inconclusive", "the interval holds zero"),
        ),
        "Fine-tuning helped: the fine-tuned model is right on 73.0 % of the 600 test rows, the base model on 36.2 %.",
        ("copilot and second_rater rated only part of the rows; each pair is compared on the rows that both rated.",),
    )
    lengths = {"min": 41, "median": 212, "p95": 390, "max": 702}
    quality = DataQuality(
        rows_read=2051,
        rows_kept=2000,
        dropped=tuple(DroppedRow(n, "empty text" if n % 3 else "no rating") for n in range(1, 52)),
        splits={
            "train": SplitQuality(1200, 140, {"Does Not Match": 610, "Unknown": 240, "Match": 350}),
            "valid": SplitQuality(200, 22, {"Does Not Match": 98, "Unknown": 41, "Match": 61}),
            "test": SplitQuality(count, 67, {label: sum(r.label == label for r in records) for label in LABELS}),
        },
        prompt_words=lengths,
        rationale_words={"min": 3, "median": 14, "p95": 31, "max": 58},
        prompt_tokens={},
        without_rationale=4,
        exact_duplicates=12,
        near_duplicate_clusters=9,
        near_duplicate_rows=23,
        label_conflicts=2,
        contradicting_rationales=("r0003", "r0411"),
        opinions={"copilot": 1602, "second_rater": 1588},
        notes=("The share of Unknown differs by 3 points between splits.",),
    )
    training = TrainingResult(
        2,
        tuple(EpochFigures(n, loss, valid, 361.2, 402_118) for n, loss, valid in ((1, 1.251, 1.034), (2, 0.914, 0.951), (3, 0.702, 0.988))),
        225,
        1196,
        {"longer than 2048 tokens": 4},
        61_204,
        402_118,
        1083.6,
        2_900_000_000,
        "bfloat16",
        2,
    )
    data = ReportData(
        project="chief-complaints",
        created="2026-11-23T18:02:11Z",
        evaluation=evaluation,
        records=records,
        answers=answers,
        quality=quality,
        training=training,
        model=ModelFacts(
            "smollm2-135m-instruct:q4_1", "sha256:" + "ab" * 32, "llama", 134_515_008, "Q4_1", 8192, 98_000_000, "apache-2.0", None, None
        ),
        approach="fine_tuning",
        approach_reason="1196 usable rows; the model can be trained on this machine",
        validation={
            "prompt_token_ids_equal": True,
            "schema_valid_answers": 1.0,
            "agreement_with_trained": 0.975,
            "rounding": {"rows": 40, "agreement": 1.0},
        },
        versions={"dataset": "0001-test-1.0.0.0", "model": "0001-model-1.0.0.0", "run": "0001-model-1.0.0.0-data-1.0.0.0"},
        lineage={"formatted_dataset.csv": "sha256:" + "12" * 32, "fine_tuned_model.gguf": "sha256:" + "cd" * 32},
        config={"seed": 42, "train": {"epochs": 3, "learning_rate": 0.001}, "evaluate": {"systems": ["base", "fine_tuned"], "gates": {}}},
        topic="respiratory infections",
    )
    return dataclasses.replace(data, **changes)


class Page(HTMLParser):
    """Collects what a browser would see: tags, attributes, text by element, scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "line", "circle"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.text += data

    @property
    def rows(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts[0]))


@pytest.fixture(scope="module")
def data() -> ReportData:
    return make_data()


@pytest.fixture(scope="module")
def source(data: ReportData) -> str:
    return render_html(data)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def hostile_data() -> ReportData:
    """Every text that a dataset or a model can bring, hostile."""
    plain = make_data(len(HOSTILE))
    records = [
        dataclasses.replace(r, record_id=f"{n}{text}", prompt=f"{INSTRUCTION}\n\nText: {text}", rationale=text)
        for n, (r, text) in enumerate(zip(plain.records, HOSTILE, strict=True))
    ]
    answers = [
        dataclasses.replace(
            plain.answers[0], record_id=r.record_id, system="base", label=None, rationale=text, error="invalid_json", response=text
        )
        for r, text in zip(records, HOSTILE, strict=True)
    ]
    quality = dataclasses.replace(
        plain.quality,
        contradicting_rationales=tuple(r.record_id for r in records),
        notes=HOSTILE,
        dropped=tuple(DroppedRow(1, text) for text in HOSTILE),
    )
    return dataclasses.replace(
        plain,
        project=HOSTILE[0],
        topic=HOSTILE[0],
        records=records,
        answers=answers,
        quality=quality,
        approach_reason=HOSTILE[0],
        versions=dict.fromkeys(HOSTILE, HOSTILE[0]),
        config={text: text for text in HOSTILE},
        lineage={text: text for text in HOSTILE},
    )


def test_page_is_whole_and_asks_the_network_for_nothing(page: Page) -> None:
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.findall(r"\{\{\w+\}\}", page.text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert "src" not in attributes
        assert "style" not in attributes  # the policy would refuse it
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]


def test_policy_admits_exactly_the_script_and_style_of_the_page(source: str, page: Page) -> None:
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)
    assert style
    for directive, code in (("style-src", style[1]), ("script-src", page.scripts[1])):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in str(policy)
    assert str(policy).startswith("default-src 'none';")
    assert "unsafe" not in str(policy)


def test_verdict_stands_before_every_figure(data: ReportData, page: Page) -> None:
    assert page.text.index(data.evaluation.verdict) < page.text.index("Agreement with the expert")


def test_every_system_has_its_figures_with_interval(data: ReportData, page: Page) -> None:
    for scores in data.evaluation.systems:
        low, high = scores.accuracy.low, scores.accuracy.high
        assert scores.accuracy.value is not None
        assert low is not None
        assert high is not None
        assert f"{scores.accuracy.value * 100:.1f} % [{low * 100:.1f}, {high * 100:.1f}]" in page.text
    assert "(invalid)" in page.text


def test_comparisons_show_difference_p_and_what_could_be_seen(data: ReportData, page: Page) -> None:
    for pair in data.evaluation.comparisons:
        assert pair.words in page.text
        assert f"{(pair.difference.value or 0) * 100:+.1f} [".replace("-", "−") in page.text
    assert "< 0.001" in page.text
    assert "4.6" in page.text


def test_rows_carry_every_answer(data: ReportData, page: Page) -> None:
    held = page.rows
    systems = [name for name, _ in held["systems"]]
    answers = {(a.record_id, a.system): a for a in data.answers}
    assert systems == list(SKILL)
    assert held["shared"] == INSTRUCTION
    assert len(held["rows"]) == 600
    for record, (record_id, label, rationale, text, given) in zip(data.records, held["rows"], strict=True):
        assert (record_id, held["labels"][label], rationale) == (record.record_id, record.label, record.rationale)
        assert f"{INSTRUCTION}\n\n{text}" == record.prompt
        for system, row in zip(systems, given, strict=True):
            answer = answers.get((record_id, system))
            if answer is None:
                assert row is None
                continue
            assert (held["labels"][row[0]] if row[0] >= 0 else None, row[1], row[2]) == (answer.label, answer.rationale, answer.error)
            assert row[4] == (answer.response if answer.error else None)


def test_every_count_of_a_confusion_matrix_finds_its_rows(data: ReportData, page: Page) -> None:
    held = page.rows
    place = {name: n for n, (name, _) in enumerate(held["systems"])}
    cells = [json.loads(a["data-cell"] or "") for _, a in page.tags if "data-cell" in a]
    assert cells
    for label, system, said in cells:
        given = [row[4][place[system]] for row in held["rows"] if held["labels"][row[1]] == label and row[4][place[system]]]
        wanted = -1 if said == INVALID else held["labels"].index(said)
        scores = data.evaluation.system(system)
        assert scores
        assert sum(answer[0] == wanted for answer in given) == scores.confusion[LABELS.index(label)][(*LABELS, INVALID).index(said)]


def test_row_that_a_model_left_out_is_invalid_and_one_a_person_left_out_is_not(data: ReportData) -> None:
    first = data.records[0].record_id
    held = Page(render_html(dataclasses.replace(data, answers=[a for a in data.answers if a.record_id != first]))).rows
    given = dict(zip([name for name, _ in held["systems"]], held["rows"][0][4], strict=True))
    assert given["base"][2] == "no_answer"
    assert given["copilot"] is None


def test_instruction_is_kept_in_place_when_prompts_share_nothing() -> None:
    data = make_data(2)
    records = [dataclasses.replace(r, prompt=f"{n} alone\n\nand more") for n, r in enumerate(data.records)]
    held = Page(render_html(dataclasses.replace(data, records=records))).rows
    assert held["shared"] == ""
    assert [row[3] for row in held["rows"]] == [r.prompt for r in records]


def test_hostile_text_stays_text() -> None:
    data = hostile_data()
    source = render_html(data)
    source.encode("utf-8")  # no lone surrogate is left
    page = Page(source)
    assert len(page.scripts) == 2
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "bold")]
    assert "<" not in page.scripts[0]
    assert "\u2028" not in page.scripts[0]
    held = page.rows
    assert [row[2].replace("\ufffd", "\ud800") for row in held["rows"]] == [r.rationale for r in data.records]
    assert HOSTILE[0] in page.text
    assert "{{data}}" in page.text


def test_summary_holds_figures_and_no_record_text(data: ReportData) -> None:
    summary = render_summary(data)
    assert data.evaluation.verdict in summary
    assert "0001-model-1.0.0.0-data-1.0.0.0" in summary
    assert "2\u202f000 kept of 2\u202f051 read" in summary
    for record in data.records:
        assert record.record_id not in summary
        assert record.rationale not in summary
        assert record.prompt[-40:] not in summary


def test_summary_tables_line_up_and_have_one_cell_a_column(data: ReportData) -> None:
    for block in render_summary(data).split("\n\n"):
        if block.startswith("|"):
            lines = block.splitlines()
            assert len({len(line) for line in lines}) == 1
            assert len({line.count("|") for line in lines}) == 1


def test_summary_is_escaped() -> None:
    data = hostile_data()
    evil = "a|b `c` [x](http://evil) <img src=x> ![i](u) **b** \u202e www.evil.example\n# head"
    evaluation = dataclasses.replace(
        data.evaluation, verdict=evil, gates=(GateResult(evil, "failed", evil),), notes=("# head", "1. one", "- item")
    )
    summary = render_summary(dataclasses.replace(data, evaluation=evaluation))
    summary.encode("utf-8")
    assert not re.findall(r"<[A-Za-z/!?]", summary)
    for raw in ("http://", "`c`", " [x]", "**b**", "\u202e", " www.e"):
        assert raw not in summary
    gate = next(line for line in summary.splitlines() if "✗" in line)
    assert len(re.findall(r"(?<!\\)\|", gate)) == 4
    assert r"- \# head" in summary
    assert r"- \- item" in summary


def test_model_set_run_says_that_nothing_was_trained() -> None:
    data = make_data(20, training=None, approach="model_set", approach_reason="only 31 usable rows", validation={})
    text = Page(render_html(data)).text
    assert "No weights were changed" in text
    assert "only 31 usable rows" in text
    assert "Loss an answer token" not in text
    assert "model set: only 31 usable rows" in render_summary(data)


def test_empty_evaluation_still_makes_a_page() -> None:
    quality = DataQuality(0, 0, (), {}, {}, {}, {}, 0, 0, 0, 0, 0, (), {})
    data = make_data(
        3,
        evaluation=Evaluation("test", LABELS, True, "base", (), (), (), ""),
        records=(),
        answers=(),
        quality=quality,
        training=None,
        model=None,
        versions={},
        lineage={},
        config={},
        validation={},
        topic=None,
    )
    text = Page(render_html(data)).text
    for sentence in (
        "Nothing was evaluated.",
        "No system was evaluated.",
        "There are no test rows.",
        "No row was dropped.",
        "No version was allocated.",
    ):
        assert sentence in text
    assert "Nothing was evaluated." in render_summary(data)


def test_undefined_figures_are_dashes_not_zeros() -> None:
    data = make_data(10)
    blank = Estimate(None)
    systems = tuple(dataclasses.replace(s, accuracy=blank, macro_f1=blank, kappa=blank) for s in data.evaluation.systems)
    text = Page(render_html(dataclasses.replace(data, evaluation=dataclasses.replace(data.evaluation, systems=systems)))).text
    assert "None" not in text
    assert "nan" not in text.lower().replace("dominan", "")
    summary = render_summary(dataclasses.replace(data, evaluation=dataclasses.replace(data.evaluation, systems=systems)))
    assert re.search(r"\| base +\| +– \| +– \| +– \|", summary)


def test_one_epoch_and_no_validation_loss_draw() -> None:
    data = make_data(5)
    assert data.training
    single = dataclasses.replace(data.training, best_epoch=1, epochs=(EpochFigures(1, 0.0, None, 0.0, 0),), stopped_early=True)
    text = Page(render_html(dataclasses.replace(data, training=single))).text
    assert "1 (kept)" in text
    assert "stopped early" in text
