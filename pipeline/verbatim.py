"""Which runs of words in some texts also stand in the records, with memory for the texts only: records go by as a stream."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from pipeline.privacy_patterns import normal

VERBATIM_WORDS = 8
# scripts without blanks between words count each character as one
_WORD = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_BATCH = 5000  # records at a time
_FACTOR = 0x9E3779B97F4A7C15 | 1


class WordRuns:
    """Texts, word by word. `joined` texts that follow each other, such as lines, are read as one."""

    def __init__(self) -> None:
        self._words: list[str] = []
        self._of: list[int] = []  # number of the text that each word is from; -1 ends a run
        self._texts = 0
        self._ids: dict[str, int] = {}

    def add(self, text: str, *, joined: bool) -> None:
        if not joined:
            self.end()
        words = words_of(text)
        self._words += words
        self._of += [self._texts] * len(words)
        self._texts += 1

    def end(self) -> None:
        """What comes next does not go on where the last text stopped."""
        self._words.append("")
        self._of.append(-1)

    def found_in(self, records: Iterable[str]) -> Iterator[tuple[int, str]]:
        """(number of the text, the words) of each run of eight or more words that a record holds, longest runs whole."""
        own = self._runs(self._words)
        hit = np.zeros(len(own), dtype=bool)
        order = np.argsort(own, kind="stable")
        ordered = own[order]
        stream = iter(records)
        while batch := list(islice(stream, _BATCH)):
            words: list[str] = []
            for text in batch:
                words += words_of(text)
                words.append("")
            runs = self._runs(words, learn=False)
            if len(ordered) and len(runs):
                first, last = np.searchsorted(ordered, runs, "left"), np.searchsorted(ordered, runs, "right")
                for start, end in {(int(a), int(b)) for a, b in zip(first, last, strict=True) if b > a} if (last > first).any() else ():
                    hit[order[start:end]] = True
        yield from self._spans(hit)

    def _spans(self, hit: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Iterator[tuple[int, str]]:
        at = 0
        while at < len(hit):
            if not hit[at]:
                at += 1
                continue
            end = at
            while end + 1 < len(hit) and hit[end + 1]:
                end += 1
            yield self._of[at], " ".join(self._words[at : end + VERBATIM_WORDS])
            at = end + 1

    def _runs(self, words: list[str], *, learn: bool = True) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """A hash of the eight words from each place on; runs over the end of a text hash to what no other run does."""
        if len(words) < VERBATIM_WORDS:
            return np.zeros(0, dtype=np.uint64)
        ids = np.fromiter((self._id(word, learn) for word in words), dtype=np.uint64, count=len(words))
        size = len(words) - VERBATIM_WORDS + 1
        runs, whole = np.zeros(size, dtype=np.uint64), np.ones(size, dtype=bool)
        for place in range(VERBATIM_WORDS):
            part = ids[place : place + size]
            runs = runs * np.uint64(_FACTOR) + part
            whole &= part != 0
        side = 1 if learn else 2  # so that a run that is none on one side never equals one on the other
        runs[~whole] = np.uint64(side)
        return runs

    def _id(self, word: str, learn: bool) -> int:
        """0 for the end of a text, and 3 for a word of the records that no text here has: that run can't match."""
        if not word:
            return 0
        known = self._ids.get(word)
        if known is None:
            if not learn:
                return 3
            known = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big") | 1 << 63
            self._ids[word] = known
        return known


def words_of(text: str) -> list[str]:
    """Words without case, accents' spelling, punctuation, layout or what does not show."""
    text = normal(text)
    return _WORD.findall(text.lower() if text.isascii() else text.casefold())
