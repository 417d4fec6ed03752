"""Which rows belong together, and which split each goes to.

Rows that share a group, or whose texts are near duplicates, share a *root*; a root lies whole in one split. Roots are put in
the order of a hash of (seed, root name) and cut at the shares, once for each rating (a root counts for its rarest one), so
that every split gets its share of every rating. New rows shift the cuts a little; rows that were assigned before stay where
they are, and the new ones fill up what the shares lack.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.near_duplicates import Ints, NearDuplicates, components
from pipeline.records import SPLITS, Split


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """For each row its split (None: it would bridge two splits) and the name of its root."""

    splits: tuple[Split | None, ...]
    roots: tuple[str, ...]
    kept: int  # rows that stay where an earlier version put them


def plan_splits(
    names: Sequence[str],
    groups: Sequence[str],
    labels: Sequence[str],
    duplicates: NearDuplicates,
    *,
    shares: Mapping[Split, float],
    seed: int,
    given: Sequence[Split | None] | None = None,
    assigned: Sequence[Split | None] | None = None,
) -> SplitPlan:
    """A split for each row.

    names: what a row is called when it has no group (stable from one version to the next). groups: "" for none. shares: of
    the splits that may be chosen. given: from a column of the table; followed to the letter. assigned: from earlier versions.
    """
    rows = len(names)
    earlier = list(assigned or [None] * rows)
    if given:
        earlier = [old if own is None and shares.get(old or "train", 0) else None for own, old in zip(given, earlier, strict=True)]
    fixed = [own or old for own, old in zip(given or [None] * rows, earlier, strict=True)]
    root = _roots(groups, duplicates)
    torn = _torn(root, fixed)
    dropped = _separate(root, fixed, groups, duplicates, torn) if torn and not given else set()
    title = _titles(root, [group or name for group, name in zip(groups, names, strict=True)])
    home = {root[row]: split for row, split in enumerate(earlier) if split}
    splits = [fixed[row] or home.get(root[row]) for row in range(rows)]
    chosen = _cut([row for row in range(rows) if row not in dropped], splits, root, title, labels, shares, seed)
    final = tuple(None if row in dropped else splits[row] or chosen[root[row]] for row in range(rows))
    return SplitPlan(final, tuple(title[r] for r in root), sum(split is not None for split in earlier))


def _roots(groups: Sequence[str], duplicates: NearDuplicates) -> list[int]:
    """A root number for each row: rows joined over groups and near duplicates."""
    clusters = duplicates.clusters()
    offset = int(clusters.max(initial=-1)) + 1
    number: dict[str, int] = {}
    edges = [(int(cluster), offset + number.setdefault(g, len(number))) for cluster, g in zip(clusters, groups, strict=True) if g]
    joined = components(np.array(edges, np.int64).reshape(-1, 2), offset + len(number))
    return [int(root) for root in joined[clusters]]


def _torn(root: Sequence[int], fixed: Sequence[Split | None]) -> set[int]:
    """Roots with rows in more than one split."""
    seen: dict[int, set[Split]] = defaultdict(set)
    for r, split in zip(root, fixed, strict=True):
        if split:
            seen[r].add(split)
    return {r for r, splits in seen.items() if len(splits) > 1}


def _titles(root: Sequence[int], names: Sequence[str]) -> dict[int, str]:
    """Each root is called after its first name in the alphabet, so that the order of rows is of no matter."""
    title: dict[int, str] = {}
    for r, name in zip(root, names, strict=True):
        title[r] = min(title.get(r, name), name)
    return title


def _separate(
    root: list[int], fixed: Sequence[Split | None], groups: Sequence[str], duplicates: NearDuplicates, torn: set[int]
) -> set[int]:
    """Takes torn roots apart, in place: new rows join what they touch, one after another; those that touch two splits are returned."""
    rows = [row for row, r in enumerate(root) if r in torn]
    joints = _joints(rows, groups, duplicates)
    parent: dict[object, object] = {}
    splits: dict[object, set[Split]] = defaultdict(set)

    def top(node: object) -> object:
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = node = parent[above]
        return node

    for row in rows:
        if split := fixed[row]:
            for joint in joints[row][:2]:
                splits[joint].add(split)
    dropped: set[int] = set()
    for row in rows:
        if fixed[row]:
            continue
        touched = {top(joint) for joint in joints[row]}
        reached = set().union(*(splits[node] for node in touched))
        if len(reached) > 1:
            dropped.add(row)
            continue
        target = top(joints[row][0])
        for node in touched:
            parent[node] = target
        splits[target] |= reached
    number: dict[tuple[object, ...], int] = {}
    base = max(root) + 1
    for row in rows:
        node = top(joints[row][0])
        part = (fixed[row],) if fixed[row] else tuple(splits[node]) or (node,)
        root[row] = number.setdefault((root[row], *part), base + len(number))
    return dropped


def _joints(rows: Sequence[int], groups: Sequence[str], duplicates: NearDuplicates) -> dict[int, list[object]]:
    """What ties each row to others: its class of texts, its group, the classes near its own."""
    near: dict[int, list[int]] = defaultdict(list)
    wanted = {int(duplicates.classes[row]) for row in rows}
    for a, b in duplicates.pairs.tolist():
        if a in wanted:
            near[a].append(b)
            near[b].append(a)
    joints: dict[int, list[object]] = {}
    for row in rows:
        own = int(duplicates.classes[row])
        joints[row] = [own, groups[row] or ("row", row), *near[own]]
    return joints


def _cut(
    rows: Sequence[int],
    splits: Sequence[Split | None],
    root: Sequence[int],
    title: Mapping[int, str],
    labels: Sequence[str],
    shares: Mapping[Split, float],
    seed: int,
) -> dict[int, Split]:
    """A split for each root that has none yet."""
    open_splits = [split for split in SPLITS if shares.get(split, 0) > 0]
    weights = np.array([shares[split] for split in open_splits])
    weights = weights / weights.sum()
    often = Counter(labels[row] for row in rows)
    stratum: dict[int, str] = {}
    for row in rows:
        stratum[root[row]] = min(stratum.get(root[row], labels[row]), labels[row], key=lambda label: (often[label], label))
    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    have = {label: np.zeros(len(open_splits)) for label in often}
    for row in rows:
        if (split := splits[row]) is None:
            sizes[stratum[root[row]]][root[row]] += 1
        elif split in open_splits:
            have[stratum[root[row]]][open_splits.index(split)] += 1
    chosen: dict[int, Split] = {}
    owed = np.zeros(len(open_splits))  # rounding is carried on to the next rating
    for label in sorted(sizes, key=lambda label: (often[label], label)):
        order = sorted(sizes[label], key=lambda r: (_hash(seed, title[r]), title[r]))
        counts = np.array([sizes[label][r] for r in order], float)
        share = weights * (counts.sum() + have[label].sum())
        pick = _pick(counts, np.maximum(share - have[label] + owed, 0), have[label] == 0)
        owed += share - have[label] - np.bincount(pick, counts, minlength=len(open_splits))
        chosen |= {r: open_splits[n] for r, n in zip(order, pick.tolist(), strict=True)}
    return chosen


def _pick(counts: NDArray[np.float64], wanted: NDArray[np.float64], lacking: NDArray[np.bool_]) -> Ints:
    """Cuts roots of `counts` rows, in order, into pieces of about `wanted` rows; a lacking split gets one root if there are enough."""
    wanted = wanted if wanted.sum() > 0 else np.ones(len(wanted))
    bounds = np.cumsum(wanted) / wanted.sum() * counts.sum()
    cuts = np.searchsorted(np.cumsum(counts) - counts / 2, bounds[:-1])
    if lacking.sum() <= len(counts):
        for n in range(len(cuts)):
            cuts[n] = max(cuts[n], (cuts[n - 1] if n else 0) + lacking[n])
        end = len(counts)
        for n in reversed(range(len(cuts))):
            end = cuts[n] = min(cuts[n], end - lacking[n + 1])
    return np.searchsorted(cuts, np.arange(len(counts)), side="right")


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}\n{name}".encode()).hexdigest()
