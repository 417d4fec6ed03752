"""Texts that are nearly the same, found among 100,000 in seconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

SHINGLE = 3  # words
SIMILAR = 0.85  # Jaccard similarity of two sets of shingles from which texts count as near duplicates
BOILERPLATE = 0.25  # a shingle in more than this share of the texts says nothing about who copied whom
TELLING = 0.5  # Jaccard similarity that is needed without boilerplate, so that filled-in forms are not all one
WINDOW = 64  # texts that share a rare shingle are compared with this many neighbours: all of them, up to 65 texts
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """`classes`: a number for each text, the same for texts with the same shingles. `pairs` (m, 2): similar classes."""

    classes: Ints
    pairs: Ints
    complete: bool  # False: some shingle was shared by so many texts that not all of them were compared

    def clusters(self) -> Ints:
        """A cluster number for each text: classes joined over pairs, transitively."""
        size = int(self.classes.max(initial=-1)) + 1
        return components(self.pairs, size)[self.classes]


def near_duplicates(texts: Sequence[str]) -> NearDuplicates:
    """Texts whose word triples overlap by `SIMILAR` or more, and by `TELLING` without boilerplate; case and punctuation forgiven.

    Exact set-similarity join with prefix and size filters (Bayardo, Ma, Srikant: Scaling Up All Pairs Similarity Search,
    WWW 2007), texts as arrays throughout.
    """
    row, shingle = _shingles(texts)
    classes, first = _same_sets(row, shingle, len(texts))
    chosen = np.zeros(len(texts), bool)
    chosen[first] = True
    keep = chosen[row]
    row, shingle = classes[row[keep]], shingle[keep]
    _, token, count = np.unique(shingle, return_inverse=True, return_counts=True)
    pairs, complete = _similar(row, token, count, len(first))
    return NearDuplicates(classes, pairs, complete)


def _shingles(texts: Sequence[str]) -> tuple[Ints, Words]:
    """(text number, shingle hash), once each, sorted."""
    vocabulary = {"": 0}
    words: list[int] = []
    ends: list[int] = []
    for text in texts:
        found = _WORD.findall(text.casefold()) or [text]
        words += [vocabulary.setdefault(word, len(vocabulary)) for word in found]
        words += [0] * (SHINGLE - len(found))
        ends.append(len(words))
    ids = np.array(words, np.uint64)
    row = np.repeat(np.arange(len(texts)), np.diff(np.array([0, *ends])))
    last = max(len(ids) - SHINGLE + 1, 0)
    mixed = np.zeros(last, np.uint64)
    for n in range(SHINGLE):
        mixed = _mix(mixed + ids[n : n + last])
    inside = row[:last] == row[SHINGLE - 1 :]
    row, mixed = row[:last][inside], mixed[inside]
    order = np.lexsort((mixed, row))
    row, mixed = row[order], mixed[order]
    new = np.ones(len(row), bool)
    new[1:] = (row[1:] != row[:-1]) | (mixed[1:] != mixed[:-1])
    return row[new], mixed[new]


def _mix(values: Words) -> Words:
    """Spreads 64 bits (SplitMix64's step: Steele, Lea, Flood, OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _same_sets(row: Ints, shingle: Words, texts: int) -> tuple[Ints, Ints]:
    """(class of each text, first text of each class); every text has a shingle."""
    starts = np.searchsorted(row, np.arange(texts))
    total = np.add.reduceat(_mix(shingle), starts) if texts else np.zeros(0, np.uint64)
    _, first, classes = np.unique(_mix(total), return_index=True, return_inverse=True)
    return classes.astype(np.int64), first.astype(np.int64)


def _similar(row: Ints, token: Ints, count: Ints, texts: int) -> tuple[Ints, bool]:
    """Pairs of texts with Jaccard similarity of `SIMILAR` or more, and whether all that share a rare shingle were compared."""
    order = np.lexsort((token, count[token], row))  # the rarest first: similar sets share one of their first few
    row, token = row[order], token[order]
    sizes = np.bincount(row, minlength=texts)
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(row)) - starts[row]
    prefix = sizes - np.ceil(SIMILAR * sizes - 1e-9).astype(np.int64) + 1
    telling = count[token] <= max(20, BOILERPLATE * texts)
    indexed = (rank < prefix[row]) & (count[token] > 1) & telling  # the rarest one that two share is telling, or they are not similar
    keys, members = token[indexed], row[indexed]
    smallest = np.full(texts, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, row, _mix(token.astype(np.uint64)))
    order = np.lexsort((smallest[members], keys))  # similar ones beside each other, for lists longer than the window
    keys, members = keys[order], members[order]
    shape = (texts, len(count))
    tables = [csr_array((part.astype(np.int32), (row, token)), shape=shape) for part in (np.ones(len(row)), telling)]
    sketch = _sketches(row, token, texts)
    found = []
    for step in range(1, WINDOW + 1):
        together = keys[:-step] == keys[step:]
        if not together.any():
            break
        a, b = members[:-step][together], members[step:][together]
        near = _possible(a, b, sizes, sketch)
        found.append(_verified(a[near], b[near], tables))
    complete = not (keys[: -WINDOW - 1] == keys[WINDOW + 1 :]).any()
    pairs = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    return np.unique(np.sort(pairs, axis=1), axis=0), complete


def _sketches(row: Ints, token: Ints, texts: int) -> Words:
    """256 parity bits a text. Two texts' bits differ in at most as many places as their sets do."""
    bit = _mix(token.astype(np.uint64)) % np.uint64(256)
    value, word = np.uint64(1) << (bit % np.uint64(64)), bit // np.uint64(64)
    sketch = np.zeros((texts, 4), np.uint64)
    filled, starts = np.unique(row, return_index=True)
    for n in range(4):
        if len(row):
            sketch[filled, n] = np.bitwise_xor.reduceat(np.where(word == n, value, np.uint64(0)), starts)
    return sketch


def _possible(a: Ints, b: Ints, sizes: Ints, sketch: Words) -> NDArray[np.bool_]:
    """Pairs that may be similar by size and sketch; no similar pair is lost."""
    near: NDArray[np.bool_] = np.minimum(sizes[a], sizes[b]) >= SIMILAR * np.maximum(sizes[a], sizes[b]) - 1e-9
    at = np.flatnonzero(near)
    different = np.bitwise_count(sketch[a[at]] ^ sketch[b[at]]).sum(axis=1)
    near[at] = different <= (1 - SIMILAR) / (1 + SIMILAR) * (sizes[a[at]] + sizes[b[at]]) + 1e-9
    return near


def _verified(a: Ints, b: Ints, tables: Sequence[csr_array], chunk: int = 20_000) -> Ints:
    """The pairs (m, 2) that are similar: with all shingles (first table) and with the telling ones (second)."""
    parts = [np.zeros((0, 2), np.int64)]
    for at in range(0, len(a), chunk):
        left, right = a[at : at + chunk], b[at : at + chunk]
        similar = np.ones(len(left), bool)
        for table, threshold in zip(tables, (SIMILAR, TELLING), strict=True):
            one, other = table[left], table[right]
            common = (one * other).sum(axis=1)
            similar &= common >= threshold * (one.sum(axis=1) + other.sum(axis=1) - common) - 1e-9
        parts.append(np.stack([left[similar], right[similar]], axis=1))
    return np.concatenate(parts)


def components(edges: Ints, nodes: int) -> Ints:
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(nodes, nodes))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
