"""Agreement, exact tests and closed-form intervals: pure numbers, no text. Figures with resampled intervals: `intervals`.

Ratings are positions on the scale, 0 to k-1 in its order; an answer without a usable rating is k. A table counts rows, shape
(k, k+1): the expert's rating down, the answer across, invalid answers last. They are wrong everywhere: misses for recall and F1, and
in kappa a category of their own that the expert never uses (so no agreement by chance is credited), at the largest distance from
every rating.

Functions of tables take any leading axes and give NaN where a figure is undefined (None in everything that leaves the evaluation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[Any]
Metric = Callable[[Array], Array]

LEVEL = 0.95
Z = float(stats.norm.ppf(0.5 + LEVEL / 2))


# --- figures of a table ------------------------------------------------------------------------------------------------


def table(expert: Sequence[int] | Array, answer: Sequence[int] | Array, k: int) -> Array:
    """Counts of rows, (k, k+1) int64: expert's rating down, answer across, invalid last."""
    cells = np.bincount(np.asarray(expert, dtype=np.int64) * (k + 1) + np.asarray(answer, dtype=np.int64), minlength=k * (k + 1))
    return cells.reshape(k, k + 1)


def accuracy(tables: Array) -> Array:
    """Share of rows answered as the expert did."""
    return ratio(np.trace(tables, axis1=-2, axis2=-1), tables.sum((-2, -1)))


def recalls(tables: Array) -> Array:
    """(..., k): of the rows that the expert rated so, the share answered so; undefined without such rows."""
    return ratio(_hits(tables), tables.sum(-1))


def precisions(tables: Array) -> Array:
    """(..., k): of the rows answered so, the share that the expert rated so; undefined when never answered."""
    return ratio(_hits(tables), tables.sum(-2)[..., :-1])


def f1s(tables: Array) -> Array:
    """(..., k): 2 hits / (rated so + answered so), precision and recall's harmonic mean (van Rijsbergen, Information Retrieval, 1979)."""
    return ratio(2 * _hits(tables), tables.sum(-1) + tables.sum(-2)[..., :-1])


def f1_of(position: int) -> Metric:
    """F1 of one rating."""
    return lambda tables: f1s(tables)[..., position]


def balanced_accuracy(tables: Array) -> Array:
    """Mean recall over the ratings that the expert gave (Brodersen et al., The balanced accuracy and its posterior distribution, 2010)."""
    return _mean_over_given(recalls(tables), tables)


def macro_f1(tables: Array) -> Array:
    """Mean F1 over the ratings that the expert gave: one divisor for all systems, whatever they answer (Opitz & Burst, Macro F1 and
    Macro F1, 2019, call it the averaged F1)."""
    return _mean_over_given(f1s(tables), tables)


def kappa(tables: Array) -> Array:
    """Agreement beyond chance (Cohen, A coefficient of agreement for nominal scales, 1960). Undefined when chance alone always agrees."""
    k = tables.shape[-2]
    return _weighted_kappa(tables, 1.0 - np.eye(k, k + 1))


def quadratic_kappa(tables: Array) -> Array:
    """Kappa with squared distances on the scale (Cohen, Weighted kappa, 1968); an invalid answer is at the largest distance."""
    k = tables.shape[-2]
    distance = (np.arange(k)[:, None] - np.arange(k + 1)[None, :]) / max(k - 1, 1)
    distance[:, k] = 1.0
    return _weighted_kappa(tables, distance**2)


def _weighted_kappa(tables: Array, disagreement: Array) -> Array:
    observed = (disagreement * tables).sum((-2, -1)) * tables.sum((-2, -1))
    expected = (disagreement * tables.sum(-1)[..., :, None] * tables.sum(-2)[..., None, :]).sum((-2, -1))
    return np.asarray(1 - ratio(observed, expected))


def _hits(tables: Array) -> Array:
    return np.asarray(np.diagonal(tables, axis1=-2, axis2=-1))


def _mean_over_given(figures: Array, tables: Array) -> Array:
    given = tables.sum(-1) > 0
    return ratio(np.where(given, figures, 0.0).sum(-1), given.sum(-1))


def ratio(above: Any, below: Any) -> Array:
    """above / below, NaN where below is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, dtype=float), np.asarray(below, dtype=float))
    return np.asarray(np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0))


# --- tests and intervals in closed form --------------------------------------------------------------------------------


def wilson(hits: float, n: float) -> tuple[float, float]:
    """The 95 % interval of hits out of n > 0 (Wilson, Probable inference, the law of succession, and statistical inference, 1927)."""
    share, square = hits / n, Z * Z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that a and b are right equally often, from the rows on which just one is (McNemar, Note on the sampling error
    of the difference between correlated proportions or percentages, 1947; exact: binomial with one half). 1.0 without such rows."""
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number, in the order given (Holm, A simple sequentially rejective multiple test procedure, 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def smallest_detectable(discordant: int, n: int, *, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest true difference of accuracy that the exact test finds with this power, given how many of n rows just one of the two gets
    right; None when no split of so few rows would be found.

    Source: the conditional power of McNemar's test (Miettinen, The matched pairs design in the case of all-or-none responses, 1968), solved
    through the beta distribution of a binomial tail (Clopper & Pearson, 1934).
    """
    if n == 0 or discordant == 0:
        return None
    needed = int(stats.binom.isf(alpha / 2, discordant, 0.5)) + 1  # rows for one side that make p <= alpha
    if needed > discordant:
        return None
    share = float(stats.beta.ppf(power, needed, discordant - needed + 1))
    return discordant / n * (2 * share - 1)


# --- agreement of several raters ---------------------------------------------------------------------------------------


def krippendorff_alpha(rows: Sequence[Sequence[int | None]], k: int, *, ordered: bool) -> float | None:
    """Krippendorff's alpha over rows x raters of positions 0 to k-1 (None: not rated); ordinal distances when `ordered`, else nominal.

    None when no row has two ratings, or all ratings are the same. Source: Krippendorff, Computing Krippendorff's alpha-reliability, 2011.
    """
    pairs = np.zeros((k, k))
    for row in rows:
        counts = np.bincount([rating for rating in row if rating is not None], minlength=k).astype(float)
        if counts.sum() > 1:
            pairs += (np.outer(counts, counts) - np.diag(counts)) / (counts.sum() - 1)
    totals = pairs.sum(0)
    if not totals.sum():
        return None
    if ordered:
        middle = np.cumsum(totals) - totals / 2
        distance = (middle[:, None] - middle[None, :]) ** 2
    else:
        distance = 1.0 - np.eye(k)
    expected = float((np.outer(totals, totals) * distance).sum())
    return number(1 - ratio((totals.sum() - 1) * (pairs * distance).sum(), expected))


def number(value: Any) -> float | None:
    """A float, None for NaN and the infinities."""
    number = float(value)
    return number if math.isfinite(number) else None
