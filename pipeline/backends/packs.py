"""Training rows packed into sequences without padding, their shared beginning once, and the loss on their answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.records import TokenRow

PACK_TOKENS = 512  # rows are packed up to this many tokens: beyond it the masked part of attention costs more than it saves


@dataclasses.dataclass(frozen=True, slots=True)
class Pack:
    """Rows in one sequence, the prompt's shared beginning once at its head; no padding.

    tokens, positions: (tokens,). mask: (tokens, tokens) bool, True where attended, or None for plain causal.
    at: (answers,) positions whose next token is a label. labels, weights: (answers,). decides: (answers,) bool, True where the
    label is one that tells ratings apart. row: (answers,) the row each belongs to.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor | None
    at: Tensor
    labels: Tensor
    weights: Tensor
    decides: Tensor
    row: Tensor


def make_pack(rows: Sequence[TokenRow], shared: int, rating_weight: float = 1.0) -> Pack:
    """Packs rows whose first `shared` prompt tokens are the same. Exact: each row sees what it would see alone.

    The last of the shared tokens is left to the rows where a row has no other prompt token before its answer.
    """
    shared = min(shared, *(len(row.prompt) - 1 for row in rows)) if len(rows) > 1 else 0
    tokens, positions = list(rows[0].prompt[:shared]), list(range(shared))
    at: list[int] = []
    labels: list[int] = []
    decides: list[bool] = []
    owner: list[int] = []
    spans = []
    for number, row in enumerate(rows):
        start = len(tokens)
        own = row.prompt[shared:] + row.answer[:-1]
        tokens += own
        positions += range(shared, shared + len(own))
        spans.append((start, len(tokens)))
        at += range(len(tokens) - len(row.answer), len(tokens))
        labels += row.answer
        decides += [place in row.rating_tokens for place in range(len(row.answer))]
        owner += [number] * len(row.answer)
    mask = None
    if len(rows) > 1:
        mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        mask[:, :shared] = True
        for start, end in spans:
            mask[start:end, start:end] = True
        mask.tril_()
    deciding = torch.tensor(decides)
    return Pack(
        torch.tensor(tokens),
        torch.tensor(positions),
        mask,
        torch.tensor(at),
        torch.tensor(labels),
        torch.where(deciding, rating_weight, 1.0),
        deciding,
        torch.tensor(owner),
    )


def pack_rows(rows: Sequence[TokenRow], shared: int, limit: int = PACK_TOKENS) -> list[list[TokenRow]]:
    """Rows in groups of at most `limit` tokens (a longer row stands alone), shortest first."""
    groups: list[list[TokenRow]] = []
    size = 0
    for row in sorted(rows, key=lambda row: (row.size, row.record_id)):
        if not groups or size + row.size - shared > limit:
            groups.append([])
            size = shared
        groups[-1].append(row)
        size += row.size - shared
    return groups


def shared_prefix(rows: Sequence[TokenRow]) -> int:
    """How many first prompt tokens all rows have in common."""
    first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def answer_logits(model: Any, pack: Pack) -> Tensor:
    """(answers, vocabulary) float32: logits at answer positions only."""
    mask = None if pack.mask is None else pack.mask[None, None]
    hidden = model.model(input_ids=pack.tokens[None], position_ids=pack.positions[None], attention_mask=mask).last_hidden_state[0]
    return model.lm_head(hidden[pack.at]).float()  # type: ignore[no-any-return]


def pack_loss(model: Any, pack: Pack) -> Tensor:
    """Sum over the pack's answer tokens of weight * cross-entropy."""
    losses = F.cross_entropy(answer_logits(model, pack), pack.labels, reduction="none")
    return (losses * pack.weights).sum()
