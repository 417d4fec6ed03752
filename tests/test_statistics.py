"""Numbers checked against scikit-learn and against constants computed by hand or taken from papers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom
from sklearn import metrics as sk

from pipeline import intervals, statistics

EXPERT = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 1, 2])
ANSWER = np.array([0, 0, 1, 1, 2, 2, 2, 0, 2, 0, 1, 1])
INVALID = 3
RNG = np.random.default_rng(7)


def sampler(n: int, clusters: list[str] | None = None) -> intervals.Resampler:
    return intervals.Resampler(clusters or range(n), seed=1)


def test_table_has_a_column_for_invalid_answers() -> None:
    table = statistics.table([0, 1, 1, 2], [0, INVALID, 1, 0], 3)
    assert table.tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    expert, answer = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    table = statistics.table(expert, answer, 3)
    assert statistics.accuracy(table) == pytest.approx(sk.accuracy_score(expert, answer))
    assert statistics.balanced_accuracy(table) == pytest.approx(sk.balanced_accuracy_score(expert, answer))
    assert statistics.macro_f1(table) == pytest.approx(sk.f1_score(expert, answer, average="macro"))
    assert statistics.kappa(table) == pytest.approx(sk.cohen_kappa_score(expert, answer))
    assert statistics.quadratic_kappa(table) == pytest.approx(sk.cohen_kappa_score(expert, answer, weights="quadratic"))
    precision, recall, f1, _ = sk.precision_recall_fscore_support(expert, answer)
    assert statistics.precisions(table) == pytest.approx(precision)
    assert statistics.recalls(table) == pytest.approx(recall)
    assert statistics.f1s(table) == pytest.approx(f1)


def test_an_invalid_answer_is_wrong_in_every_figure() -> None:
    expert, right, invalid = [0, 1, 2] * 5, [0, 1, 2] * 5, [0, 1, 2] * 4 + [INVALID] * 3
    good, worse = (statistics.table(expert, answer, 3) for answer in (right, invalid))
    for metric in (
        statistics.accuracy,
        statistics.balanced_accuracy,
        statistics.macro_f1,
        statistics.kappa,
        statistics.quadratic_kappa,
    ):
        assert metric(good) == pytest.approx(1.0)
        assert metric(worse) < 0.95
    assert statistics.accuracy(worse) == pytest.approx(0.8)
    assert statistics.kappa(worse) == pytest.approx((0.8 - 0.8 / 3) / (1 - 0.8 / 3))  # chance agreement: 3 x 1/3 x 4/15
    # quadratic: disagreement 3/15 observed; by chance 1/9 (0+1/4+1+1/4+0+1/4+1+1/4+0) x 12/15 + 3/15
    assert statistics.quadratic_kappa(worse) == pytest.approx(1 - 0.2 / (0.8 / 3 + 0.2))
    silent = statistics.table(expert, [INVALID] * 15, 3)
    assert statistics.accuracy(silent) == 0
    assert statistics.kappa(silent) == 0
    assert statistics.quadratic_kappa(silent) == 0


def test_a_rating_absent_from_the_rows_does_not_change_the_divisor() -> None:
    perfect = statistics.table([0, 0, 1], [0, 0, 1], 3)
    assert statistics.macro_f1(perfect) == statistics.balanced_accuracy(perfect) == 1
    stray = statistics.table([0, 0, 1, 1], [0, 2, 1, 1], 3)
    assert statistics.macro_f1(stray) == pytest.approx((2 / 3 + 1) / 2)
    assert np.isnan(statistics.f1s(perfect)[2])


def test_kappa_is_undefined_where_chance_alone_agrees() -> None:
    assert np.isnan(statistics.kappa(statistics.table([1, 1], [1, 1], 3)))
    assert np.isnan(statistics.quadratic_kappa(statistics.table([1, 1], [1, 1], 3)))
    assert intervals.table_figure(statistics.kappa, np.array([1, 1]), np.array([1, 1]), 3).value is None


def test_quadratic_kappa_follows_the_order_of_the_scale() -> None:
    expert, near, far = [0, 0, 1, 1, 2, 2], [1, 0, 1, 1, 2, 2], [2, 0, 1, 1, 2, 2]
    near_table, far_table = statistics.table(expert, near, 3), statistics.table(expert, far, 3)
    assert statistics.quadratic_kappa(near_table) > statistics.quadratic_kappa(far_table)


def test_wilson_gives_known_intervals() -> None:
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I: 81/263, 15/148, 0/20, 1/29
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert statistics.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert statistics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert statistics.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_a_proportion_of_independent_rows_is_wilson() -> None:
    hits = np.arange(263) < 81
    found = intervals.estimate(intervals.share_figure(hits, np.ones(263, dtype=bool)), sampler(263))
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (found.method, found.n) == ("wilson", 263)


def test_copies_of_rows_in_clusters_add_nothing() -> None:
    hits = np.arange(50) < 30
    once = intervals.estimate(intervals.share_figure(hits, np.ones(50, dtype=bool)), sampler(50))
    clusters = [str(i) for i in range(50) for _ in range(4)]
    copied = intervals.estimate(intervals.share_figure(np.repeat(hits, 4), np.ones(200, dtype=bool)), sampler(200, clusters))
    assert copied.method == "wilson, clusters"
    assert copied.value == once.value
    assert copied.low is not None
    assert once.low is not None
    assert copied.low == pytest.approx(once.low, abs=0.005)
    assert copied.n == 200


def test_one_cluster_or_no_variation_still_has_an_interval() -> None:
    everything = np.ones(10, dtype=bool)
    one = intervals.estimate(intervals.share_figure(np.arange(10) < 7, everything), sampler(10, ["a"] * 10))
    assert one.low is not None
    assert one.low < 0.2
    alike = intervals.estimate(intervals.share_figure(np.arange(200) % 4 < 2, np.ones(200, dtype=bool)), sampler(200, ["a", "b"] * 100))
    assert alike.low is not None
    assert alike.low < 0.2  # two groups that happen to agree are still two groups
    perfect = intervals.estimate(intervals.share_figure(everything, everything), sampler(10, ["a", "b"] * 5))
    assert (perfect.low, perfect.high) == pytest.approx(statistics.wilson(2, 2))
    single = intervals.estimate(intervals.share_figure(everything[:1], everything[:1]), sampler(1))
    assert (single.value, single.low, single.high) == pytest.approx((1.0, 0.2065, 1.0), abs=5e-5)


def test_bootstrap_of_a_mean_is_near_the_normal_interval_and_repeats() -> None:
    values = list(RNG.normal(0.5, 0.1, 400))
    found = intervals.estimate(intervals.mean_figure(values), sampler(400))
    again = intervals.estimate(intervals.mean_figure(values), sampler(400))
    half = 1.96 * np.std(values) / 20
    assert found == again
    assert found.value == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(np.mean(values) - half, abs=0.001)
    assert found.high == pytest.approx(np.mean(values) + half, abs=0.001)
    assert found.method == "bootstrap"


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    expert = RNG.integers(0, 3, (200, 120))
    answer = np.where(RNG.random((200, 120)) < 0.6, expert, RNG.integers(0, 3, (200, 120)))
    draws = sampler(120)
    truth = 0.6  # right 60 % + a third of the rest: kappa of the process is 0.6
    covered = 0
    for e, a in zip(expert, answer, strict=True):
        found = intervals.estimate(intervals.table_figure(statistics.kappa, e, a, 3, bounds=(-1, 1)), draws)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_clusters_widen_the_interval() -> None:
    values = np.repeat(RNG.random(30), 10)
    clusters = [str(i // 10) for i in range(300)]
    rows = intervals.estimate(intervals.mean_figure(list(values)), sampler(300))
    grouped = intervals.estimate(intervals.mean_figure(list(values)), sampler(300, clusters))
    assert grouped.method == "bootstrap, clusters"
    assert grouped.low is not None
    assert rows.low is not None
    assert grouped.high is not None
    assert rows.high is not None
    assert (grouped.high - grouped.low) > 2.5 * (rows.high - rows.low)


def test_large_sets_are_drawn_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = intervals.mean_figure(list(RNG.random(50)))
    whole = intervals.estimate(figure, sampler(50))
    monkeypatch.setattr(intervals, "_KEPT_WEIGHTS", 5000)
    assert intervals.estimate(figure, sampler(50)) == whole


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    easy = RNG.random(200) < 0.7
    a = b = easy
    a = np.where(np.arange(200) < 10, True, a)
    rows = np.ones(200, dtype=bool)
    figures = [intervals.share_figure(x, rows) for x in (a, b)]
    found = intervals.difference(*figures, sampler(200))
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 0.06
    back = intervals.difference(figures[1], figures[0], sampler(200))
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_identical_systems_differ_by_zero_but_not_for_sure() -> None:
    rows = np.ones(100, dtype=bool)
    figure = intervals.share_figure(np.arange(100) < 70, rows)
    found = intervals.difference(figure, figure, sampler(100))
    assert found.value == 0
    assert found.method == "wilson, no spread"
    assert (found.low, found.high) == pytest.approx((-0.0370, 0.0370), abs=5e-5)


def test_always_against_never_right_stays_within_bounds() -> None:
    rows = np.ones(3, dtype=bool)
    found = intervals.difference(intervals.share_figure(rows, rows), intervals.share_figure(~rows, rows), sampler(3))
    assert (found.value, found.high) == (1, 1)
    assert found.low is not None
    assert found.low < 0


def test_a_perfect_table_is_not_certain() -> None:
    found = intervals.estimate(intervals.table_figure(statistics.macro_f1, EXPERT, EXPERT, 3), sampler(12))
    assert found.value == found.high == 1
    assert found.low == pytest.approx(statistics.wilson(12, 12)[0])


def test_figures_without_rows_are_none() -> None:
    none = intervals.estimate(intervals.mean_figure([None, None]), sampler(2))
    assert (none.value, none.low, none.high, none.n) == (None, None, None, 0)
    nowhere = np.zeros(2, dtype=bool)
    share = intervals.estimate(intervals.share_figure(nowhere, nowhere), sampler(2))
    assert (share.value, share.n) == (None, 0)
    assert intervals.estimate(intervals.mean_figure([]), sampler(0)).value is None
    apart = intervals.difference(intervals.mean_figure([1.0, None]), intervals.mean_figure([None, 1.0]), sampler(2))
    assert apart.value is None
    assert intervals.mean_figure([float("nan"), 0.5]).n == 1


@pytest.mark.parametrize(("groups", "has_interval"), [(2, False), (5, False), (6, True)])
def test_a_handful_of_clusters_has_no_interval(groups: int, has_interval: bool) -> None:
    clusters = [str(i % groups) for i in range(300)]
    found = intervals.estimate(intervals.mean_figure(list(RNG.random(300))), sampler(300, clusters))
    assert found.value is not None
    assert (found.low is not None) == has_interval


def test_small_samples_get_wider_intervals_that_cover() -> None:
    draws, covered = sampler(8), 0
    for _ in range(300):
        found = intervals.estimate(intervals.mean_figure(list(RNG.normal(0, 0.1, 8))), draws)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert 0.91 <= covered / 300 <= 0.99  # a plain percentile interval covers about 0.88


def test_a_mostly_undefined_figure_has_no_interval() -> None:
    expert, answer = np.zeros(40, dtype=int), np.zeros(40, dtype=int)
    answer[0] = 1
    kappa = intervals.estimate(intervals.table_figure(statistics.kappa, expert, answer, 2, bounds=(-1, 1)), sampler(40))
    assert kappa.value == 0
    rare = intervals.table_figure(lambda t: np.where(t[..., 0, 1] > 3, 1.0, np.nan), expert, answer, 2)
    assert intervals.estimate(rare, sampler(40)).value is None


def test_exact_mcnemar() -> None:
    assert statistics.mcnemar(0, 0) == 1
    assert statistics.mcnemar(5, 5) == 1
    assert statistics.mcnemar(6, 0) == pytest.approx(2 / 64)
    assert statistics.mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert statistics.mcnemar(10, 2) == statistics.mcnemar(2, 10)


def test_holm_adjusts_in_the_order_given() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("discordant", "n"), [(12, 100), (40, 100), (90, 600)])
def test_the_smallest_detectable_difference_has_the_power_it_claims(discordant: int, n: int) -> None:
    smallest = statistics.smallest_detectable(discordant, n)
    assert smallest is not None
    share = (smallest * n / discordant + 1) / 2
    found = [k for k in range(discordant + 1) if statistics.mcnemar(k, discordant - k) <= 0.05 and 2 * k > discordant]
    assert binom.pmf(found, discordant, share).sum() == pytest.approx(0.8)


def test_too_few_discordant_rows_detect_nothing() -> None:
    assert statistics.smallest_detectable(5, 100) is None  # 2 / 32 > 0.05
    assert statistics.smallest_detectable(6, 100) is not None
    assert statistics.smallest_detectable(0, 100) is None
    assert statistics.smallest_detectable(0, 0) is None


def test_brier_score() -> None:
    figure = intervals.brier_figure([[1, 0, 0], [0.5, 0.5, 0], None, [0, 0, 1]], [0, 1, 2, 0])
    assert figure.value == pytest.approx((0 + 0.5 + 2) / 3)
    assert figure.n == 3


def test_calibration_error_of_tied_and_of_calibrated_probabilities() -> None:
    tied = intervals.calibration_figure([[0.9, 0.1]] * 100, [0] * 60 + [1] * 40)
    assert tied.value == pytest.approx(0.3)  # one bin: order of rows can't matter
    sure = intervals.calibration_figure([[0.8, 0.2]] * 100 + [[0.4, 0.6]] * 100, [0] * 80 + [1] * 20 + [1] * 60 + [0] * 40)
    assert sure.value == pytest.approx(0, abs=1e-12)
    assert intervals.calibration_figure([None, None], [0, 1]).value is None
    found = intervals.estimate(sure, sampler(200))
    assert found.low == pytest.approx(0, abs=1e-12)
    assert found.high is not None
    assert found.high < 0.2


def test_calibration_bins_hold_about_equal_numbers() -> None:
    surest = np.linspace(0.5, 1, 100)
    figure = intervals.calibration_figure([[p, 1 - p] for p in surest], [0] * 100)
    assert figure.columns.shape[1] == intervals.BINS + 1
    assert [int((column != 0).sum()) for column in figure.columns[:, : intervals.BINS].T] == [10] * 9 + [9]  # the last row is exact
    assert figure.value == pytest.approx(np.mean(1 - surest))


# Krippendorff, Computing Krippendorff's alpha-reliability, 2011, section C and D: four observers, twelve units, values 1 to 5.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def test_krippendorff_alpha_of_the_paper() -> None:
    rows = [[None if v is None else v - 1 for v in unit] for unit in zip(*OBSERVERS, strict=True)]
    assert statistics.krippendorff_alpha(rows, 5, ordered=False) == pytest.approx(0.743, abs=5e-4)
    assert statistics.krippendorff_alpha(rows, 5, ordered=True) == pytest.approx(0.815, abs=5e-4)


def test_krippendorff_alpha_undefined() -> None:
    assert statistics.krippendorff_alpha([], 3, ordered=True) is None
    assert statistics.krippendorff_alpha([[0, None], [1, None]], 3, ordered=True) is None
    assert statistics.krippendorff_alpha([[1, 1], [1, 1]], 3, ordered=False) is None
