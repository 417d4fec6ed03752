"""The ratings as token sequences: where they branch, how likely each is, which one decoding gives. Pure numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Ids = tuple[int, ...]
Branch = Callable[[Ids, Ids], Mapping[int, float]]  # (ids so far, ids allowed next) -> their probabilities, adding up to 1


@dataclass(frozen=True, slots=True)
class RatingTree:
    """`paths`: label -> ids from the answer's first token to the rationale's. `branches`: ids so far -> ids allowed next, wherever
    there is more than one."""

    paths: Mapping[str, Ids]
    branches: Mapping[Ids, Ids]

    @property
    def longest(self) -> int:
        return max(map(len, self.paths.values()))

    def places(self, label: str) -> list[Ids]:
        """The beginnings of the label's path at which a choice is made, shortest first."""
        path = self.paths[label]
        return [path[:n] for n in range(len(path)) if path[:n] in self.branches]

    def probabilities(self, branch: Branch) -> dict[str, float]:
        """label -> product along its path of the probabilities that `branch` gives; they add up to 1."""
        shares = {place: branch(place, allowed) for place, allowed in self.branches.items()}
        return {label: math.prod(shares[place][self.paths[label][len(place)]] for place in self.places(label)) for label in self.paths}

    def choose(self, branch: Branch, temperature: float, chance: random.Random) -> str:
        """The label that decoding gives: at each branch the likeliest id, or one drawn at that temperature."""
        left = dict(self.paths)
        while len(left) > 1:
            depth = 0
            while len({path[depth] for path in left.values()}) == 1:
                depth += 1
            place = next(iter(left.values()))[:depth]
            allowed = self.branches[place]
            shares = branch(place, allowed)
            if temperature > 0:
                heat = [math.exp(math.log(max(shares[token], 1e-30)) / temperature) for token in allowed]
                token = chance.choices(allowed, heat)[0]
            else:
                token = max(allowed, key=lambda token: shares[token])
            left = {label: path for label, path in left.items() if path[depth] == token}
        return next(iter(left))


def rating_tree(paths: Mapping[str, Sequence[int]]) -> RatingTree:
    """The tree of the labels' token sequences, of which none may begin another."""
    nexts: dict[Ids, dict[int, None]] = {}
    for path in paths.values():
        for n, token in enumerate(path):
            nexts.setdefault(tuple(path[:n]), {})[token] = None
    branches = {place: tuple(sorted(tokens)) for place, tokens in nexts.items() if len(tokens) > 1}
    return RatingTree({label: tuple(path) for label, path in paths.items()}, branches)
