"""The labels as token sequences: where they branch, what each is likely to be, which one decoding gives. Pure numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

Ids = tuple[int, ...]
Branch = Callable[[Ids, Ids], Mapping[int, float]]  # (path, tokens that may follow) -> their probabilities, adding up to 1


class LabelTree:
    """The labels as token sequences from the answer's opening to the rationale's, and where they branch."""

    def __init__(self, paths: Mapping[str, Ids]) -> None:
        self.paths = dict(paths)
        self.longest = max(map(len, self.paths.values()))

    def next_branch(self, prefix: Ids) -> tuple[Ids, Ids]:
        """(path, branches): the first path from `prefix` on where more than one token may follow; no branches: a label's whole path."""
        while True:
            depth = len(prefix)
            tokens = sorted({path[depth] for path in self.paths.values() if path[:depth] == prefix and len(path) > depth})
            if len(tokens) != 1:
                return prefix, tuple(tokens)
            prefix += (tokens[0],)

    def probabilities(self, branch: Branch) -> dict[str, float]:
        """Label -> product along its path of the probabilities that `branch(path, tokens)` gives; they add up to 1."""
        label_of = {path: label for label, path in self.paths.items()}
        found: dict[str, float] = {}
        waiting: list[tuple[Ids, float]] = [((), 1.0)]
        while waiting:
            prefix, so_far = waiting.pop()
            path, tokens = self.next_branch(prefix)
            if not tokens:
                found[label_of[path]] = so_far
                continue
            shares = branch(path, tokens)
            waiting += [((*path, token), so_far * shares[token]) for token in tokens]
        return {label: found[label] for label in self.paths}

    def choose(self, branch: Branch, temperature: float, chance: random.Random) -> str:
        """The label that decoding gives: at each branch the likeliest token, or one drawn at that temperature."""
        prefix: Ids = ()
        while True:
            path, tokens = self.next_branch(prefix)
            if not tokens:
                return next(label for label, whole in self.paths.items() if whole == path)
            shares = branch(path, tokens)
            if temperature > 0:
                heat = [math.exp(math.log(max(shares[token], 1e-30)) / temperature) for token in tokens]
                prefix = (*path, chance.choices(tokens, heat)[0])
            else:
                prefix = (*path, max(tokens, key=lambda token: shares[token]))
