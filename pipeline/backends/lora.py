"""LoRA training on the dequantised weights of a GGUF file, and the export of what was learnt into GGUF again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.backends import gguf
from pipeline.backends.lora_model import add_lora, load_model, model_config
from pipeline.backends.packs import PACK_TOKENS, answer_logits, make_pack, pack_loss, pack_rows, shared_prefix
from pipeline.config import TrainConfig
from pipeline.errors import FineTuningNotSupportedError, TrainingFailedError
from pipeline.ports import BaseModel, Progress, TrainingEstimate, quiet
from pipeline.rating_tree import RatingTree
from pipeline.records import EpochFigures, TokenRow, TrainingResult, fingerprint
from pipeline.store import writing

WARM_UP = 0.1  # share of the steps
CLIP_NORM = 1.0
EFFICIENCY = 0.4  # share of the matrix products' speed that a whole step reaches, as measured
LIBRARIES_BYTES = 2 << 30  # libraries, the engine that read the prompts, and what the allocator keeps: measured 1.5 to 2.5 GiB


def fastest_dtype() -> torch.dtype:
    """bfloat16 where a matrix product of a training step's shape is clearly faster in it than in float32, else float32."""
    return torch.bfloat16 if _gemm_speed(torch.bfloat16) > 1.25 * _gemm_speed(torch.float32) else torch.float32


def learning_rate_at(step: int, steps: int) -> float:
    """Factor of the learning rate at a step (0-based): warm-up over a tenth of the steps, then linear to zero."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else max(steps - step, 1) / max(steps - warm, 1)


@dataclasses.dataclass
class _State:
    """What a checkpoint holds besides the weights."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    figures: list[EpochFigures] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class LoraRun:
    """One training run: model, adapter, optimiser, rows. `run()` trains from the last checkpoint on."""

    def __init__(
        self,
        base: gguf.GgufFile,
        train: Sequence[TokenRow],
        valid: Sequence[TokenRow],
        config: TrainConfig,
        *,
        seed: int,
        folder: Path,
        key: str,
        progress: Progress = quiet,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.base, self.train_rows, self.valid_rows = base, list(train), list(valid)
        self.config, self.seed, self.progress, self.key = config, seed, progress, key
        self.checkpoint = folder / ".checkpoint" / "state.pt"
        saved = self._saved()
        self.dtype = dtype or (getattr(torch, saved["dtype"]) if saved else fastest_dtype())
        self.model = load_model(base, self.dtype)
        self.lora = add_lora(self.model, config, seed)
        self.parameters = [weight for layer in self.lora.values() for weight in (layer.a, layer.b)]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
        self.shared = shared_prefix([*self.train_rows, *self.valid_rows])
        self.steps_an_epoch = -(-len(self.train_rows) // config.batch_size)
        self.steps = self.steps_an_epoch * config.epochs
        self.state = _State()
        self.best = self._adapter()
        if saved:
            self._restore(saved)

    def run(self) -> TrainingResult:
        """Trains to the end and puts the best epoch's weights into the model.

        Raises:
            TrainingFailedError: the loss is not finite, or memory ran out.
        """
        for epoch in range(self.state.epoch, self.config.epochs):
            begun = time.perf_counter()
            train_loss, tokens = self._epoch(epoch)
            valid_loss, accuracy = self.evaluate(self.valid_rows) if self.valid_rows else (None, None)
            seconds = time.perf_counter() - begun
            self.state.figures.append(EpochFigures(epoch + 1, train_loss, valid_loss, seconds, tokens, accuracy))
            self.state.seconds += seconds
            loss = train_loss if valid_loss is None else valid_loss
            if not math.isfinite(loss):
                raise TrainingFailedError(f"the loss is not finite after epoch {epoch + 1}", hint="try a learning rate ten times smaller")
            if loss < self.state.best_loss:
                self.state.best_loss, self.state.best_epoch, self.best = loss, epoch + 1, self._adapter()
            self.state.epoch = epoch + 1
            self._save()
        self._load_adapter(self.best)
        self.model.eval()
        return TrainingResult(
            best_epoch=self.state.best_epoch,
            epochs=tuple(self.state.figures),
            steps=self.steps,
            trained_rows=len(self.train_rows),
            refused_rows={},
            answer_tokens=sum(len(row.answer) for row in self.train_rows),
            row_tokens=sum(row.size for row in self.train_rows),
            shared_prefix_tokens=self.shared,
            seconds=self.state.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )

    def _epoch(self, epoch: int) -> tuple[float, int]:
        """Mean loss an answer token, and row tokens trained on."""
        torch.manual_seed(self.seed * 1_000_003 + epoch)  # the epoch's order and dropout, the same after a resume
        order = torch.randperm(len(self.train_rows)).tolist()
        self.model.train(self.config.dropout > 0)
        total, weight, tokens = 0.0, 0.0, 0
        begun = time.perf_counter()
        for step in range(self.steps_an_epoch):
            rows = [self.train_rows[n] for n in order[step * self.config.batch_size : (step + 1) * self.config.batch_size]]
            loss, answers = self._step(rows, epoch * self.steps_an_epoch + step)
            total, weight, tokens = total + loss, weight + answers, tokens + sum(row.size for row in rows)
            rate = tokens / (time.perf_counter() - begun)
            done = epoch * self.steps_an_epoch + step + 1
            left = (self.steps - done) * tokens / (step + 1) / rate
            note = f"epoch {epoch + 1}/{self.config.epochs}, loss {loss / answers:.3f}, {rate:,.0f} tokens/s, {left / 60:.1f} min left"
            self.progress("train", done, self.steps, note)
        return total / weight, tokens

    def _step(self, rows: Sequence[TokenRow], step: int) -> tuple[float, float]:
        packs = [make_pack(group, self.shared, self.config.rating_weight) for group in pack_rows(rows, self.shared)]
        answers = sum(float(pack.weights.sum()) for pack in packs)
        total = 0.0
        with _out_of_memory_told():
            for pack in packs:
                loss = pack_loss(self.model, pack) / answers
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            norm = float(nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise TrainingFailedError(
                f"the loss is not finite at step {step + 1} of {self.steps}", hint="try a learning rate ten times smaller"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_at(step, self.steps)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return total * answers, answers

    @torch.no_grad()
    def evaluate(self, rows: Sequence[TokenRow]) -> tuple[float, float]:
        """(mean loss an answer token, weighted as in training; share of rows whose rating a greedy answer gets right)."""
        self.model.eval()
        total, weight, right = 0.0, 0.0, 0
        for group in pack_rows(rows, self.shared):
            pack = make_pack(group, self.shared, self.config.rating_weight)
            logits = answer_logits(self.model, pack)
            total += float((F.cross_entropy(logits, pack.labels, reduction="none") * pack.weights).sum())
            weight += float(pack.weights.sum())
            for number, row in enumerate(group):
                places = torch.nonzero((pack.row == number) & pack.decides).flatten().tolist()
                right += all(
                    int(logits[place][list(allowed)].argmax()) == allowed.index(int(pack.labels[place]))
                    for place, allowed in zip(places, row.branches, strict=True)
                )
        return total / weight, right / len(rows)

    # checkpoints

    def _adapter(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.parameters]

    def _load_adapter(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)

    def _save(self) -> None:
        state = dataclasses.asdict(self.state)
        content = {
            "key": self.key,
            "dtype": str(self.dtype).removeprefix("torch."),
            "state": state,
            "adapter": self._adapter(),
            "best": self.best,
            "optimiser": self.optimiser.state_dict(),
        }
        with writing(self.checkpoint) as temporary:
            torch.save(content, temporary)

    def _saved(self) -> dict[str, Any] | None:
        """The checkpoint of this very run, or None."""
        if not self.checkpoint.is_file():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        except Exception:  # noqa: BLE001  a torn or foreign file of any kind: train from the start
            return None
        return saved if saved.get("key") == self.key else None

    def _restore(self, saved: Mapping[str, Any]) -> None:
        figures = [EpochFigures(**figure) for figure in saved["state"]["figures"]]
        self.state = _State(**{**saved["state"], "figures": figures})
        self.best = saved["best"]
        self._load_adapter(saved["adapter"])
        self.optimiser.load_state_dict(saved["optimiser"])

    # export

    def deltas(self) -> Iterator[tuple[str, gguf.Float32]]:
        """(tensor, change) of each trained tensor, in the file's order of tensors and rows."""
        for name in self.base.tensors:
            if name in self.lora:
                yield name, _in_file_order(self.base, name, self.lora[name].delta())

    def pairs(self) -> dict[str, tuple[gguf.Float32, gguf.Float32]]:
        """tensor -> (A, B), rows in the file's order."""
        return {name: (layer.a.detach().numpy(), _in_file_order(self.base, name, layer.b.detach())) for name, layer in self.lora.items()}


def _in_file_order(base: gguf.GgufFile, name: str, values: Tensor) -> gguf.Float32:
    order = gguf.row_order(base, name)
    return values.numpy() if order is None else values.numpy()[order]


@contextlib.contextmanager
def _out_of_memory_told() -> Iterator[None]:
    """Turns a failed allocation, which PyTorch reports as a RuntimeError, into TrainingFailedError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise TrainingFailedError("training ran out of memory", hint="a smaller base model or shorter rows need less") from error


def peak_memory_bytes() -> int:
    """The most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


# --- the ports -------------------------------------------------------------------------------------------------------


class TrainedLora:
    """A finished run, to be written and checked (ports.TrainedModel)."""

    def __init__(self, run: LoraRun, result: TrainingResult) -> None:
        self.run, self.result = run, result
        self._types: Mapping[str, str] = {}

    def write(self, output_dir: Path) -> dict[str, Any]:
        run = self.run
        gguf.write_adapter(run.base, run.pairs(), alpha=run.config.alpha, path=output_dir / "adapter.gguf")
        report = gguf.write_merged(run.base, run.deltas(), frozenset(run.lora), output_dir / "fine_tuned_model.gguf")
        self._types = report.types
        stored = list(report.types.values())
        return {
            "merged_tensors": {kind: stored.count(kind) for kind in sorted(set(stored))},
            "kept_cosine_lowest": report.lowest_kept_cosine,
            "kept_cosine_median": report.median_kept_cosine,
        }

    def write_unchanged(self, path: Path) -> None:
        base = self.run.base
        zeros = ((name, torch.zeros(base.tensors[name].shape).numpy()) for name in base.tensors if name in self.run.lora)
        gguf.write_merged(base, zeros, frozenset(self.run.lora), path, types=self._types)

    @torch.no_grad()
    def rating_probabilities(self, prompts: Sequence[Sequence[int]], tree: RatingTree) -> list[dict[str, float]]:
        def branch(prompt: Sequence[int], place: Sequence[int], allowed: Sequence[int]) -> dict[int, float]:
            shares = torch.softmax(self._next_logits((*prompt, *place))[list(allowed)], 0)
            return dict(zip(allowed, shares.tolist(), strict=True))

        return [tree.probabilities(partial(branch, prompt)) for prompt in prompts]

    @torch.no_grad()
    def top_logprobs(self, tokens: Sequence[int], n: int) -> dict[int, float]:
        top = torch.log_softmax(self._next_logits(tokens), 0).topk(n)
        return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def _next_logits(self, tokens: Sequence[int]) -> Tensor:
        model: Any = self.run.model
        hidden = model.model(input_ids=torch.tensor([list(tokens)])).last_hidden_state[0, -1]
        return model.lm_head(hidden).float()  # type: ignore[no-any-return]


class LoraTrainer:
    """LoRA on this machine's processor (ports.Trainer)."""

    def unsupported(self, base: BaseModel) -> str | None:
        with gguf.open_gguf(base.path) as file:
            try:
                model_config(file)
            except FineTuningNotSupportedError as error:
                return str(error)
        return None

    def estimate(self, base: BaseModel, train: Sequence[TokenRow], valid: Sequence[TokenRow], config: TrainConfig) -> TrainingEstimate:
        dtype = fastest_dtype()
        with gguf.open_gguf(base.path) as file:
            shape = model_config(file)
            head = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
            matrices = base.facts.parameters - shape.vocab_size * shape.hidden_size - head
        shared = shared_prefix([*train, *valid])
        processed = _processed_tokens(train, shared, config.batch_size) * config.epochs
        answers = sum(len(row.answer) for row in train) * config.epochs
        checked = _processed_tokens(valid, shared, len(valid) or 1) * config.epochs
        work = 4 * (matrices * processed + shape.vocab_size * shape.hidden_size * answers) + 2 * matrices * checked
        size = torch.empty((), dtype=dtype).element_size()
        longest = max([PACK_TOKENS, *(row.size for row in train)])
        kept = (
            shape.num_hidden_layers * (12 * shape.hidden_size + 5 * shape.intermediate_size) * size
            + 6 * shape.num_attention_heads * longest
        )
        logits = 3 * 4 * shape.vocab_size * max(_largest_answers(train, shared), default=1)
        return TrainingEstimate(
            seconds=work / _gemm_speed(dtype) / EFFICIENCY,
            memory_bytes=int(base.facts.parameters * size + longest * kept + logits + LIBRARIES_BYTES),
        )

    def train(
        self,
        base: BaseModel,
        train: Sequence[TokenRow],
        valid: Sequence[TokenRow],
        config: TrainConfig,
        *,
        seed: int,
        folder: Path,
        progress: Progress = quiet,
    ) -> TrainedLora:
        key = fingerprint(base.facts.digest, list(train), list(valid), config, seed)
        with _out_of_memory_told():
            run = LoraRun(gguf.open_gguf(base.path), train, valid, config, seed=seed, folder=folder, key=key, progress=progress)
            return TrainedLora(run, run.run())


def _processed_tokens(rows: Sequence[TokenRow], shared: int, batch: int) -> int:
    """Tokens that really pass through the model in one epoch."""
    rows = sorted(rows, key=lambda row: row.record_id)
    batches = (rows[n : n + batch] for n in range(0, len(rows), batch))
    packs = [group for part in batches for group in pack_rows(part, shared)]
    return sum(sum(row.size - shared for row in group) + shared for group in packs)


def _largest_answers(rows: Sequence[TokenRow], shared: int) -> list[int]:
    return [sum(len(row.answer) for row in group) for group in pack_rows(rows, shared)]


def _gemm_speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product of a training step's shape."""
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    laps = []
    for _ in range(8):
        begun = time.perf_counter()
        a @ b
        laps.append(time.perf_counter() - begun)
    return 2 * 512 * 576 * 1536 / sorted(laps)[len(laps) // 2]
