"""The evaluation on invented answers, whose figures are known by construction, and on PubMedQA's human raters."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import EvaluateConfig
from pipeline.errors import ConfigError
from pipeline.evaluation import check_gates, evaluate, gate_exit_code
from pipeline.evaluation_gates import Gate, gate_outcome
from pipeline.records import Answer, AnswerError, Estimate, Evaluation, Rating, RatingScale, Record, to_plain

SHARED = Path(__file__).parents[2] / "shared" / "data"
SCALE = RatingScale((Rating(0, "No"), Rating(-1, "Unknown", abstain=True), Rating(1, "Yes")))
PLAIN = RatingScale((Rating("n", "no"), Rating("m", "maybe"), Rating("y", "yes")), ordered=False)
QUIET = EvaluateConfig(metrics=())


def records(labels: Sequence[str], groups: Sequence[str] | None = None, rationale: str = "because") -> list[Record]:
    return [Record(f"r{i}", groups[i] if groups else f"g{i}", "test", f"text {i}", label, rationale) for i, label in enumerate(labels)]


def answer(
    row: int,
    system: str,
    label: str | None,
    *,
    error: AnswerError | None = None,
    rationale: str | None = "because",
    probabilities: Mapping[str, float] | None = None,
) -> Answer:
    given = system not in ("base", "fine_tuned", "model_set")
    return Answer(
        f"r{row}",
        system,
        "sha256:0",
        "",
        label,
        rationale,
        error,
        "stop",
        probabilities,
        10,
        20,
        0.5,
        "given" if given else "embedded",
        None,
    )


def answers(system: str, labels: Sequence[str | None]) -> list[Answer]:
    return [answer(i, system, label, error=None if label else "invalid_json") for i, label in enumerate(labels)]


def overlap(metric: str, responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
    """1.0 for equal texts; None for the text that can't be scored."""
    assert responses
    return [None if mine == "odd" else float(mine == expert) for mine, expert in zip(responses, references, strict=True)]


def run(
    rows: Sequence[Record],
    given: Sequence[Answer],
    *,
    scale: RatingScale = SCALE,
    config: EvaluateConfig = QUIET,
    primary: str = "fine_tuned",
    train: Sequence[str] = ("Yes",),
) -> Evaluation:
    result = evaluate(rows, given, scale=scale, config=config, score=overlap, seed=42, primary=primary, train_labels=train)
    json.dumps(to_plain(result), allow_nan=False)  # refuses NaN and numpy's types
    return result


EXPERT = ["Yes", "No", "Yes", "Unknown", "No", "Yes", "No", "No", "Yes", "No"] * 20
WRONG = {"Yes": "No", "No": "Yes", "Unknown": "Yes"}


def spoiled(every: int, start: int = 0) -> list[str | None]:
    return [WRONG[label] if i % every == start else label for i, label in enumerate(EXPERT)]


def test_scores_of_one_system() -> None:
    mine: list[str | None] = ["Yes", "No", None, "Unknown", "Yes", "Unknown", "No", "No", "Yes", "No"]
    result = run(records(EXPERT[:10]), answers("fine_tuned", mine), train=["No", "Yes", "No"])
    scores = result.system("fine_tuned")
    assert scores is not None
    assert (scores.n, scores.n_invalid, dict(scores.errors)) == (10, 1, {"invalid_json": 1})
    assert scores.accuracy.value == 0.7
    assert scores.confusion == ((4, 0, 1, 0), (0, 1, 0, 0), (0, 1, 2, 1))
    assert scores.balanced_accuracy.value == pytest.approx((4 / 5 + 1 + 2 / 4) / 3)
    assert scores.macro_f1.value == pytest.approx((8 / 9 + 2 / 3 + 4 / 7) / 3)
    assert scores.per_rating["Yes"].precision.value == pytest.approx(2 / 3)
    assert scores.per_rating["Yes"].recall.value == 0.5
    assert scores.per_rating["Yes"].support == 4
    assert scores.decided_accuracy is not None
    assert scores.decided_accuracy.value == pytest.approx(6 / 9)
    assert scores.abstention_rate == 0.2
    assert scores.quadratic_kappa is not None
    assert (scores.mean_seconds, scores.mean_output_tokens) == (0.5, 20)
    assert scores.brier is None
    assert scores.calibration_error is None
    for estimate in (scores.accuracy, scores.macro_f1, scores.kappa, scores.balanced_accuracy, scores.per_rating["No"].f1):
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high


def test_the_majority_baseline_answers_the_training_rows_most_frequent_rating() -> None:
    result = run(records(EXPERT), answers("fine_tuned", spoiled(4)), train=["Yes", "No", "Yes"])
    majority = result.system("majority")
    assert majority is not None
    assert (majority.kind, majority.n, majority.accuracy.value) == ("baseline", 200, 0.4)
    assert majority.kappa.value == 0
    assert majority.per_rating["No"].precision.value is None
    tied = run(records(EXPERT), answers("fine_tuned", spoiled(4)), train=["Yes", "No"]).system("majority")
    assert tied is not None
    assert tied.accuracy.value == 0.5  # the lower rating
    without = run(records(EXPERT), answers("fine_tuned", spoiled(4)), train=[])
    assert without.system("majority") is None
    assert any("no majority baseline" in note for note in without.notes)


def test_a_clear_gain_is_better_and_said_so() -> None:
    result = run(records(EXPERT), answers("base", spoiled(2)) + answers("fine_tuned", spoiled(10)))
    pair = result.comparison("fine_tuned", "base")
    assert pair is not None
    assert (pair.verdict, pair.n, pair.only_a_right, pair.only_b_right) == ("better", 200, 80, 0)
    assert pair.difference.value == pytest.approx(0.4)
    assert (
        "The fine-tuned model is better than the base model: 90.0 % against 50.0 % right on the same 200 rows, +40.0 points" in pair.words
    )
    assert result.verdict.startswith(
        "Fine-tuning helped: the fine-tuned model is right on 90.0 % of the 200 test rows, the base model on 50.0 %"
    )
    assert "It is better than always giving the most frequent rating (40.0 %;" in result.verdict


def test_a_loss_is_worse_and_said_so() -> None:
    result = run(records(EXPERT), answers("base", spoiled(10)) + answers("fine_tuned", spoiled(2)))
    pair = result.comparison("fine_tuned", "base")
    assert pair is not None
    assert pair.verdict == "worse"
    assert result.verdict.startswith("Fine-tuning did not help here; it made the answers worse: ")
    assert "−40.0 points" in result.verdict


def test_a_small_difference_is_not_decided_and_says_what_could_be_seen() -> None:
    result = run(records(EXPERT), answers("base", spoiled(4)) + answers("fine_tuned", spoiled(4, 1)))
    pair = result.comparison("fine_tuned", "base")
    assert pair is not None
    assert (pair.verdict, pair.difference.value, pair.p_value) == ("not decided", 0, 1.0)
    assert pair.smallest_detectable is not None
    assert f"below about {100 * pair.smallest_detectable:.1f} points" in pair.words
    assert result.verdict.startswith("Fine-tuning is not shown to help here: ")


def test_holm_counts_all_pairs() -> None:
    rows, given = records(EXPERT), answers("base", spoiled(5)) + answers("fine_tuned", spoiled(8))
    few, more = run(rows, given), run(rows, given + answers("copilot", spoiled(7)) + answers("second", spoiled(6)))
    assert (len(few.comparisons), len(more.comparisons)) == (3, 10)
    a, b = few.comparison("fine_tuned", "base"), more.comparison("fine_tuned", "base")
    assert a is not None
    assert b is not None
    assert a.p_value == b.p_value
    assert b.p_holm > a.p_holm >= a.p_value
    assert [pair.a for pair in more.comparisons[:4]] == ["fine_tuned"] * 4


def test_an_interval_above_zero_is_not_enough_when_holm_says_otherwise() -> None:
    mine = [WRONG[label] if i < 20 else label for i, label in enumerate(EXPERT)]
    base = [WRONG[label] if i < 26 else label for i, label in enumerate(EXPERT)]
    many = [answer(i, f"rater{r}", label) for r in range(3) for i, label in enumerate(EXPERT)]
    alone = run(records(EXPERT), answers("base", base) + answers("fine_tuned", mine), train=[]).comparison("fine_tuned", "base")
    among = run(records(EXPERT), answers("base", base) + answers("fine_tuned", mine) + many, train=[]).comparison("fine_tuned", "base")
    assert alone is not None
    assert among is not None
    assert among.difference.low is not None
    assert among.difference.low > 0
    assert alone.verdict == "better"
    assert among.verdict == "not decided"


def test_a_missing_answer_of_a_model_is_wrong() -> None:
    result = run(records(EXPERT[:10]), answers("fine_tuned", list(EXPERT[:6])))
    scores = result.system("fine_tuned")
    assert scores is not None
    assert (scores.n, scores.n_invalid, dict(scores.errors), scores.accuracy.value) == (10, 4, {"no_answer": 4}, 0.6)
    assert "4 of its 10 answers had no usable rating and count as wrong." in result.verdict
    assert any("no answer to 4 of 10 rows" in note for note in result.notes)


def test_a_primary_system_without_any_answer_is_all_wrong() -> None:
    result = run(records(EXPERT), answers("base", spoiled(3)))
    scores = result.system("fine_tuned")
    assert scores is not None
    assert (scores.n, scores.accuracy.value, dict(scores.errors)) == (200, 0, {"no_answer": 200})
    assert scores.kappa.value == 0
    assert result.verdict.startswith("Fine-tuning did not help")


def test_given_systems_are_scored_on_their_rows_and_compared_on_common_ones() -> None:
    copilot = [answer(i, "copilot", "Yes") for i in range(50)] + [answer(i, "copilot", None, error="no_answer") for i in range(50, 60)]
    second = [answer(i, "second", label) for i, label in enumerate(EXPERT) if i >= 100]
    unheard = [replace(answer(0, "third", "Yes"), record_id="elsewhere")]
    result = run(records(EXPERT), answers("fine_tuned", spoiled(4)) + copilot + second + unheard)
    kinds = {scores.system: (scores.kind, scores.n, scores.n_invalid) for scores in result.systems}
    assert kinds["copilot"] == ("given", 50, 0)
    assert kinds["second"] == ("given", 100, 0)
    assert kinds["third"] == ("given", 0, 0)
    against, apart = result.comparison("fine_tuned", "copilot"), result.comparison("copilot", "second")
    assert against is not None
    assert against.n == 50
    assert apart is not None
    assert (apart.n, apart.verdict, apart.difference.value) == (0, "not decided", None)
    assert apart.words == "The copilot and rater second have no rows in common, so they can't be compared."
    assert "the copilot on the 50 rows that both rated" in result.verdict
    assert "It is worse than rater second on the 100 rows that both rated" in result.verdict
    third = result.system("third")
    assert third is not None
    assert third.accuracy.value is None
    assert any("Rater third rated 0 of 200 rows" in note for note in result.notes)
    assert any("Agreement of the expert and" in note and "Krippendorff's alpha (ordinal) is 1.000" in note for note in result.notes)


def test_an_unusable_given_rating_is_wrong() -> None:
    result = run(records(EXPERT[:4]), [answer(0, "copilot", None, error="unknown_label"), answer(1, "copilot", "No")], primary="copilot")
    scores = result.system("copilot")
    assert scores is not None
    assert (scores.n, scores.n_invalid, scores.accuracy.value) == (2, 1, 0.5)


def test_the_last_answer_of_a_row_counts() -> None:
    result = run(records(["Yes", "No"]), [*answers("fine_tuned", [None, "No"]), answer(0, "fine_tuned", "Yes")])
    scores = result.system("fine_tuned")
    assert scores is not None
    assert scores.accuracy.value == 1


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_or_no_rows(n: int) -> None:
    result = run(records(EXPERT[:n]), answers("base", EXPERT[:2]) + answers("fine_tuned", EXPERT[:2]))
    pair = result.comparison("fine_tuned", "base")
    assert pair is not None
    assert pair.verdict == "not decided"
    scores = result.system("fine_tuned")
    assert scores is not None
    if n == 0:
        assert scores.accuracy.value is None
        assert result.verdict == "There are no test rows, so nothing can be said of the fine-tuned model."
    else:
        assert scores.accuracy.value == 1
        assert scores.accuracy.low is not None
        assert scores.accuracy.low < 0.4
        assert "No row told the two apart, so no difference can show." in result.verdict


def test_one_rating_only() -> None:
    result = run(records(["Yes"] * 20), answers("base", ["Yes"] * 20) + answers("fine_tuned", ["Yes"] * 19 + ["No"]))
    base, mine = result.system("base"), result.system("fine_tuned")
    assert base is not None
    assert mine is not None
    assert (base.kappa.value, base.macro_f1.value) == (None, 1)
    assert mine.kappa.value == 0
    assert mine.per_rating["Unknown"].recall.value is None
    assert any("no row “No” or “Unknown”" in note for note in result.notes)


def test_all_answers_invalid() -> None:
    result = run(records(EXPERT), answers("fine_tuned", [None] * 200))
    scores = result.system("fine_tuned")
    assert scores is not None
    assert (scores.n_invalid, scores.accuracy.value, scores.macro_f1.value, scores.kappa.value) == (200, 0, 0, 0)
    assert "200 of its 200 answers had no usable rating" in result.verdict
    assert "It is worse than always giving the most frequent rating" in result.verdict


def test_groups_that_repeat_are_resampled_whole() -> None:
    groups = [f"g{i // 20}" for i in range(200)]
    wrong_in_two_groups = [WRONG[label] if i < 40 else label for i, label in enumerate(EXPERT)]
    apart = run(records(EXPERT), answers("base", list(EXPERT)) + answers("fine_tuned", wrong_in_two_groups))
    grouped = run(records(EXPERT, groups), answers("base", list(EXPERT)) + answers("fine_tuned", wrong_in_two_groups))
    a, b = apart.comparison("fine_tuned", "base"), grouped.comparison("fine_tuned", "base")
    assert a is not None
    assert b is not None
    assert (a.verdict, b.verdict) == ("worse", "not decided")  # two of ten groups decide nothing
    assert b.p_holm < 0.001
    assert any("The 200 rows form 10 groups" in note for note in grouped.notes)
    scores, single = grouped.system("fine_tuned"), apart.system("fine_tuned")
    assert scores is not None
    assert single is not None
    assert scores.accuracy.method == "wilson, clusters"
    assert scores.accuracy.low is not None
    assert single.accuracy.low is not None
    assert scores.accuracy.low < single.accuracy.low - 0.1


def test_two_groups_decide_nothing() -> None:
    groups = [f"g{i % 2}" for i in range(200)]
    result = run(records(EXPERT, groups), answers("base", spoiled(3)) + answers("fine_tuned", spoiled(10)))
    pair = result.comparison("fine_tuned", "base")
    assert pair is not None
    assert pair.p_holm < 0.001
    assert pair.verdict == "not decided"
    assert "too few rows or groups for an interval" in pair.words


def test_probabilities_give_brier_score_and_calibration() -> None:
    given = [answer(i, "fine_tuned", label, probabilities={label: 0.8, WRONG[label]: 0.2}) for i, label in enumerate(EXPERT[:100])]
    result = run(records(EXPERT[:100]), given)
    scores = result.system("fine_tuned")
    assert scores is not None
    assert scores.brier is not None
    assert scores.brier.value == pytest.approx(0.08)
    assert scores.calibration_error is not None
    assert scores.calibration_error.value == pytest.approx(0.2)
    partly = [replace(a, probabilities=None) if i < 30 else a for i, a in enumerate(given)]
    partly[40] = replace(partly[40], probabilities={"Yes": float("nan")})
    result = run(records(EXPERT[:100]), partly)
    scores = result.system("fine_tuned")
    assert scores is not None
    assert scores.brier is not None
    assert scores.brier.n == 69
    assert any("known for 69 of 100 rows" in note for note in result.notes)


def test_rationales_are_scored_where_there_are_two() -> None:
    rows = records(EXPERT[:6])
    rows[5] = replace(rows[5], rationale="")
    texts = ["because", "other", None, " ", "odd", "because"]
    given = [answer(i, "fine_tuned", EXPERT[i], rationale=text) for i, text in enumerate(texts)]
    result = run(rows, given + answers("base", [None] * 6), config=EvaluateConfig(metrics=("rouge", "chrf")))
    scores = result.system("fine_tuned")
    assert scores is not None
    assert [found.metric for found in scores.rationale] == ["rouge", "chrf"]
    assert (scores.rationale[0].estimate.value, scores.rationale[0].estimate.n, scores.rationale[0].n_unscored) == (0.5, 2, 4)
    majority = result.system("majority")
    assert majority is not None
    assert majority.rationale == ()


def test_rationales_that_nobody_gave_are_unscored_without_a_call() -> None:
    result = run(records(EXPERT[:6], rationale=""), answers("fine_tuned", list(EXPERT[:6])), config=EvaluateConfig(metrics=("rouge",)))
    scores = result.system("fine_tuned")
    assert scores is not None
    assert (scores.rationale[0].estimate.value, scores.rationale[0].n_unscored) == (None, 6)


def test_unordered_scales_without_abstention() -> None:
    result = run(records(["no", "yes", "maybe"]), answers("fine_tuned", ["no", "yes", "yes"]), scale=PLAIN, train=["yes"])
    scores = result.system("fine_tuned")
    assert scores is not None
    assert (scores.quadratic_kappa, scores.decided_accuracy, scores.abstention_rate) == (None, None, None)


def test_same_input_same_output_whatever_the_order_of_answers() -> None:
    given = answers("base", spoiled(2)) + answers("fine_tuned", spoiled(10)) + answers("copilot", spoiled(3))
    assert run(records(EXPERT), given) == run(records(EXPERT), given[::-1])


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        seen.append((done, total))

    evaluate(
        records(EXPERT[:3]),
        answers("base", ["Yes", "No", "Yes"]),
        scale=SCALE,
        config=QUIET,
        score=overlap,
        seed=1,
        primary="base",
        train_labels=["No"],
        progress=progress,
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]


# --- gates -------------------------------------------------------------------------------------------------------------


def gated(gates: Mapping[str, Mapping[str, str]], **more: Sequence[str | None]) -> Evaluation:
    given = answers("base", spoiled(2)) + answers("fine_tuned", spoiled(10))
    for system, labels in more.items():
        given += answers(system, labels)
    return run(records(EXPERT), given, config=EvaluateConfig(metrics=(), gates=gates))


@pytest.mark.parametrize(
    ("gates", "outcome", "code"),
    [
        ({}, None, 0),
        ({"fine_tuned.accuracy": {"value": ">= 0.6"}}, "passed", 0),
        ({"fine_tuned.accuracy": {"value": ">=60%"}}, "passed", 0),
        ({"fine_tuned.accuracy": {"value": ">= 0.97"}}, "failed", 100),
        ({"fine_tuned.accuracy": {"value": ">= 0.9"}}, "inconclusive", 101),
        ({"fine_tuned.accuracy": {"ci_low": ">= 0.85"}}, "passed", 0),
        ({"fine_tuned.accuracy": {"ci_low": ">= 0.89"}}, "failed", 100),
        ({"fine_tuned.accuracy - base.accuracy": {"ci_low": ">= -0.02"}}, "passed", 0),
        ({"base.macro_f1 - fine_tuned.macro_f1": {"value": "> 0"}}, "failed", 100),
        ({"fine_tuned.invalid_rate": {"value": "< 0.05"}}, "passed", 0),
        ({"fine_tuned.recall.Yes - base.recall.Yes": {"value": "> 0"}}, "passed", 0),
        ({"fine_tuned.precision.Yes - majority.precision.Yes": {"value": "> 0.3"}}, "passed", 0),
        ({"fine_tuned.brier": {"value": "<= 0.5"}}, "inconclusive", 101),
        ({"fine_tuned.accuracy": {"value": ">= 0.97", "ci_high": "<= 1"}}, "failed", 100),
    ],
)
def test_gates(gates: Mapping[str, Mapping[str, str]], outcome: str | None, code: int) -> None:
    result = gated(gates)
    assert len(result.gates) == sum(len(bounds) for bounds in gates.values())
    if outcome:
        assert result.gates[0].outcome == outcome
        assert result.gates[0].words.startswith(outcome.capitalize())
    assert gate_exit_code(result) == code


def test_a_gate_on_the_baseline_that_is_not_there_is_inconclusive() -> None:
    config = EvaluateConfig(metrics=(), gates={"fine_tuned.accuracy - majority.accuracy": {"value": "> 0"}})
    result = run(records(EXPERT), answers("fine_tuned", spoiled(10)), config=config, train=[])
    assert [gate.outcome for gate in result.gates] == ["inconclusive"]


def test_wrong_gates_are_named_all_at_once_before_anything_is_computed() -> None:
    gates = {
        "finetuned.accuracy": {"value": ">= 0.6"},
        "fine_tuned.acuracy": {"value": ">= 0.6"},
        "fine_tuned.accuracy": {"mean": ">= 0.6", "value": "0.6"},
        "fine_tuned.accuracy - basis.accuracy": {"ci_low": "> 0"},
        "base.quadratic_kappa": {"value": "> 0"},
        "base.kappa": {},
    }
    with pytest.raises(ConfigError) as caught:
        run([], answers("base", ["yes"]), scale=PLAIN, config=EvaluateConfig(gates=gates, judge="llama3"))
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 8
    for part in (
        "'finetuned.accuracy' starts with no known system; there are base, fine_tuned,",
        "did you mean accuracy?",
        "mean: '>= 0.6' is not one of value, ci_low, ci_high",
        "value: '0.6'",
        "'basis.accuracy'",
        "no bound",
        "evaluate.judge: 'llama3'",
    ):
        assert part in problems


def test_gates_may_name_systems_and_ratings_with_dots_and_dashes() -> None:
    scale = RatingScale((Rating(0, "a - b"), Rating(1, "c.d")))
    config = EvaluateConfig(gates={"dr. x.recall.a - b - base.recall.c.d": {"value": "> 0"}})
    (gate,) = check_gates(config, systems=["base", "dr. x"], scale=scale)
    assert (gate.a, gate.b) == (("dr. x", "recall.a - b"), ("base", "recall.c.d"))


def test_an_undefined_figure_decides_no_gate() -> None:
    gate = Gate("x.kappa", ("x", "kappa"), None, "value", ">=", 0.5)
    assert gate_outcome(gate, Estimate(None)) == "inconclusive"
    assert gate_outcome(gate, Estimate(0.9)) == "inconclusive"
    assert gate_outcome(gate, Estimate(0.9, 0.5, 1.0)) == "passed"


# --- real raters -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "pubmedqa").is_dir(), reason="the shared data is not here")
def test_pubmedqa_human_raters_score_what_the_paper_says() -> None:
    with (SHARED / "pubmedqa" / "rated.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["official_split"] == "test"]
        file.seek(0)
        train = [row["rating"] for row in csv.DictReader(file) if row["official_split"] != "test"]
    given = [answer(i, "second", row["second_rating"]) for i, row in enumerate(rows)]
    result = run(records([row["rating"] for row in rows]), given, scale=PLAIN, primary="second", train=train)
    second, majority = result.system("second"), result.system("majority")
    assert second is not None
    assert majority is not None
    assert second.n == majority.n == 500
    assert second.accuracy.value == pytest.approx(0.780)
    assert second.macro_f1.value == pytest.approx(0.722, abs=5e-4)
    assert majority.accuracy.value == pytest.approx(0.552)
    pair = result.comparison("second", "majority")
    assert pair is not None
    assert pair.verdict == "better"
