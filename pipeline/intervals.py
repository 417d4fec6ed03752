"""Figures over rows with their intervals: Wilson for shares, else a bootstrap over rows or clusters of rows; paired for differences.

Every figure is a function of sums over rows, so that one product of matrices gives it for all draws.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from pipeline.records import Estimate
from pipeline.statistics import LEVEL, Array, Metric, number, ratio, wilson

DRAWS = 2000
BINS = 10
FEWEST = 6  # rows or clusters: resampling fewer shows no interval worth the name (five of five in one direction have p = 0.06)
_KEPT_WEIGHTS = 8_000_000  # numbers: larger sets of draws are made again for each figure, a slice at a time


@dataclass(frozen=True, eq=False, kw_only=True)
class Figure:
    """Something computed from sums over rows, which is what makes every figure resample in one product of matrices.

    `columns`: (rows, c), zero in rows that don't count. `rows`: (rows,) bool, the rows it is about. `of_sums`: (..., c) -> (...), NaN where
    undefined. `bounds`: the least and greatest possible value. `proportion`: hits and counted rows are the two columns.
    """

    columns: Array
    rows: Array
    of_sums: Metric
    bounds: tuple[float, float] = (0.0, 1.0)
    proportion: bool = False

    def on(self, rows: Array) -> Figure:
        """The same over these rows only."""
        return replace(self, columns=self.columns * rows[:, None], rows=self.rows & rows)

    @property
    def value(self) -> float | None:
        return number(self.of_sums(self.columns.sum(0)))

    @property
    def n(self) -> int:
        """Rows that enter the value (for a proportion, its denominator)."""
        return int(self.columns[:, 1].sum()) if self.proportion else int(self.rows.sum())


def table_figure(
    metric: Metric, expert: Array, answer: Array, k: int, rows: Array | None = None, bounds: tuple[float, float] = (0.0, 1.0)
) -> Figure:
    """A function of tables over the given rows (default all). `expert`, `answer`: (rows,) positions; ignored where `rows` is false."""
    rows = np.ones(len(expert), dtype=bool) if rows is None else rows
    cells = np.zeros((len(expert), k * (k + 1)))
    at = np.flatnonzero(rows)
    cells[at, expert[at] * (k + 1) + answer[at]] = 1.0

    def of_sums(sums: Array) -> Array:
        return metric(sums.reshape(*sums.shape[:-1], k, k + 1))

    return Figure(columns=cells, rows=rows, of_sums=of_sums, bounds=bounds)


def mean_figure(values: Sequence[float | None], bounds: tuple[float, float] = (0.0, 1.0)) -> Figure:
    """The mean over rows that have a value."""
    rows = np.array([value is not None and math.isfinite(value) for value in values], dtype=bool)
    numbers = np.array([float(value) if ok and value is not None else 0.0 for value, ok in zip(values, rows, strict=True)])
    return Figure(columns=np.column_stack([numbers, rows.astype(float)]), rows=rows, of_sums=_share, bounds=bounds)


def share_figure(hits: Array, among: Array, rows: Array | None = None) -> Figure:
    """The share of hits among some rows. Both (rows,) bool; `rows`: those on which it can be compared (default `among`)."""
    columns = np.column_stack([hits & among, among]).astype(float)
    return Figure(columns=columns, rows=among if rows is None else rows, of_sums=_share, proportion=True)


def brier_figure(probabilities: Sequence[Sequence[float] | None], expert: Sequence[int] | Array) -> Figure:
    """Mean over rows of the squared distance between probabilities and the expert's rating: 0 is perfect, 2 the worst (Brier, Verification
    of forecasts expressed in terms of probability, 1950). `probabilities`: k numbers a row, or None."""
    return mean_figure([None if p is None else _brier(p, int(e)) for p, e in zip(probabilities, expert, strict=True)], bounds=(0.0, 2.0))


def _brier(probabilities: Sequence[float], expert: int) -> float:
    return sum((p - (position == expert)) ** 2 for position, p in enumerate(probabilities))


def calibration_figure(probabilities: Sequence[Sequence[float] | None], expert: Sequence[int] | Array) -> Figure:
    """Expected calibration error of the most probable rating: over bins of about equal numbers of rows, the mean distance between
    confidence and share right (Naeini et al., Obtaining well calibrated probabilities using Bayesian binning, 2015; equal-mass bins:
    Nguyen & O'Connor, Posterior calibration and exploratory analysis for natural language processing models, 2015).

    At most 10 bins, of 10 rows or more; rows of equal confidence share a bin. Draws keep the bins of the whole.
    """
    rows = np.array([p is not None for p in probabilities], dtype=bool)
    surest = np.array([0.0 if p is None else max(p) for p in probabilities])
    right = np.array([p is not None and list(p).index(max(p)) == e for p, e in zip(probabilities, expert, strict=True)])
    bins = max(1, min(BINS, int(rows.sum()) // 10))
    edges = np.quantile(surest[rows], np.arange(1, bins) / bins) if rows.any() else np.empty(0)
    place = np.searchsorted(edges, surest, side="right")
    columns = np.zeros((len(rows), bins + 1))
    columns[rows, place[rows]] = right[rows] - surest[rows]
    columns[:, bins] = rows
    return Figure(columns=columns, rows=rows, of_sums=_calibration_error)


def _calibration_error(sums: Array) -> Array:
    return ratio(np.abs(sums[..., :-1]).sum(-1), sums[..., -1])


def _share(sums: Array) -> Array:
    return ratio(sums[..., 0], sums[..., 1])


# --- intervals ---------------------------------------------------------------------------------------------------------


class Resampler:
    """Bootstrap draws of rows, or of clusters of rows where `clusters` repeat; the same draws for every figure.

    Source: Efron, Bootstrap methods: another look at the jackknife, 1979; whole clusters: Davison & Hinkley, Bootstrap methods and their
    application, 1997, section 3.8.
    """

    def __init__(self, clusters: Sequence[Hashable], *, seed: int, draws: int = DRAWS) -> None:
        places: dict[Hashable, int] = {}
        self.unit = np.array([places.setdefault(cluster, len(places)) for cluster in clusters], dtype=np.int64)
        self.units, self.seed, self.draws = len(places), seed, draws
        self.clustered = self.units < len(self.unit)
        self._kept: list[Array] | None = None

    def sums(self, columns: Array) -> Array:
        """(draws, c): the sums of (rows, c) columns in each draw."""
        by_unit = np.column_stack([np.bincount(self.unit, column, self.units) for column in columns.T])
        return np.concatenate([weights @ by_unit for weights in self._weights()])

    def units_of(self, rows: Array) -> int:
        """How many clusters have one of these rows."""
        return len(np.unique(self.unit[rows]))

    def _weights(self) -> Iterator[Array]:
        """How often each unit was drawn, (some draws, units), until all draws are made."""
        if self._kept is not None:
            yield from self._kept
            return
        rng, slices = np.random.default_rng(self.seed), []
        step, keep = max(1, _KEPT_WEIGHTS // self.units), self.draws * self.units <= _KEPT_WEIGHTS
        for start in range(0, self.draws, step):
            count = min(step, self.draws - start)
            drawn = rng.integers(self.units, size=(count, self.units)) + np.arange(count)[:, None] * self.units
            weights = np.bincount(drawn.ravel(), minlength=count * self.units).reshape(count, self.units).astype(float)
            if keep:
                slices.append(weights)
            yield weights
        self._kept = slices if keep else None


def estimate(figure: Figure, resampler: Resampler) -> Estimate:
    """The figure with its 95 % interval: Wilson for a proportion, else percentile bootstrap."""
    if figure.proportion:
        return proportion(figure, resampler)
    return _bootstrap(figure, resampler)


def difference(a: Figure, b: Figure, resampler: Resampler) -> Estimate:
    """a minus b on the rows that both are about, each draw taking the same rows for both: a paired percentile bootstrap.

    Source: Koehn, Statistical significance tests for machine translation evaluation, 2004.
    """
    rows = a.rows & b.rows
    a, b = a.on(rows), b.on(rows)
    width = a.columns.shape[1]

    def of_sums(sums: Array) -> Array:
        return a.of_sums(sums[..., :width]) - b.of_sums(sums[..., width:])

    bounds = (a.bounds[0] - b.bounds[1], a.bounds[1] - b.bounds[0])
    both = Figure(columns=np.hstack([a.columns, b.columns]), rows=rows, of_sums=of_sums, bounds=bounds)
    return _bootstrap(both, resampler)


def _bootstrap(figure: Figure, resampler: Resampler) -> Estimate:
    """Expanded percentile interval, its ends moved out for small numbers of rows or clusters (Hesterberg, What teachers should know about
    the bootstrap, 2015), and widened to hold the value, which matters for figures that resampling biases, such as calibration error.
    Undefined draws are left out; when they are the majority, or rows or clusters are too few, there is no interval."""
    method = "bootstrap, clusters" if resampler.clustered else "bootstrap"
    value = figure.value if figure.n else None
    if value is None:
        return Estimate(None, method=method, n=figure.n)
    drawn = figure.of_sums(resampler.sums(figure.columns))
    drawn = drawn[np.isfinite(drawn)]
    if 2 * len(drawn) < resampler.draws:
        return Estimate(value, method=method, n=figure.n)
    if np.ptp(drawn) < 1e-12:
        return _without_spread(value, figure, resampler)
    units = resampler.units_of(figure.rows)
    if units < FEWEST:
        return Estimate(value, method=method, n=figure.n)
    tail = float(stats.norm.cdf(math.sqrt(units / (units - 1)) * stats.t.ppf((1 - LEVEL) / 2, units - 1)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value, min(float(low), value), max(float(high), value), method, figure.n)


def _without_spread(value: float, figure: Figure, resampler: Resampler) -> Estimate:
    """When all rows agree (a perfect system, say) draws can't differ, which is not certainty: up to a share w of unseen rows may differ,
    w being the end of Wilson's interval for 0 out of as many; the figure may move by w of its way to each bound."""
    w = wilson(0, resampler.units_of(figure.rows))[1]
    least, most = figure.bounds
    return Estimate(value, value - w * (value - least), value + w * (most - value), "wilson, no spread", figure.n)


def proportion(figure: Figure, resampler: Resampler) -> Estimate:
    """A share of rows with Wilson's interval. Where clusters repeat, n is divided by the design effect of the linearised variance between
    clusters (Kish, Survey sampling, 1965; Korn & Graubard, Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data, 1998), so that many rows of one cluster don't count as so many independent ones."""
    hits, n = (float(total) for total in figure.columns.sum(0))
    method = "wilson, clusters" if resampler.clustered else "wilson"
    if n == 0:
        return Estimate(None, method=method)
    share = hits / n
    effective = _effective_rows(figure, resampler, share, n) if resampler.clustered else n
    low, high = wilson(share * effective, effective)
    return Estimate(share, min(low, share), max(high, share), method, int(n))


def _effective_rows(figure: Figure, resampler: Resampler, share: float, n: float) -> float:
    counted = figure.columns[:, 1] > 0
    clusters = resampler.units_of(counted)
    simple = share * (1 - share) / n
    if clusters < 2 or simple == 0:
        return float(clusters)
    apart = np.bincount(resampler.unit, figure.columns[:, 0] - share * figure.columns[:, 1], resampler.units)
    between = clusters / (clusters - 1) * float(apart @ apart) / (n * n)
    few = float(stats.norm.ppf(0.5 + LEVEL / 2) / stats.t.ppf(0.5 + LEVEL / 2, clusters - 1))  # the variance is a guess from few clusters
    return n / max(1.0, between / simple) * few**2
