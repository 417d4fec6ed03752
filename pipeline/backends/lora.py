"""LoRA training on the dequantised weights of a GGUF file, and the export of what was learnt into GGUF again.

LoRA: Hu et al., 2021, arXiv 2106.09685. A frozen W gains (alpha / rank) * B @ A. The layer is written out here rather than taken from
a library: A and B stay float32 while the product runs in the model's type, and nothing else is copied.
"""

from __future__ import annotations

import dataclasses
import math
import re
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pipeline.backends import gguf
from pipeline.config import TrainConfig
from pipeline.errors import ArtifactError, FineTuningNotSupportedError, TrainingFailedError
from pipeline.ports import BaseModel, Progress, TrainingEstimate, quiet
from pipeline.rating_tree import RatingTree
from pipeline.records import EpochFigures, TokenRow, TrainingResult, fingerprint
from pipeline.store import writing

ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_PARTS = r"attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down"
_KNOWN_TENSORS = {
    "llama": re.compile(rf"(?:token_embd|output_norm|output|rope_freqs|blk\.\d+\.(?:{_PARTS}))\.weight"),
    "qwen2": re.compile(rf"(?:token_embd|output_norm|output|blk\.\d+\.(?:{_PARTS}))\.weight|blk\.\d+\.attn_[qkv]\.bias"),
    "qwen3": re.compile(rf"(?:token_embd|output_norm|output|blk\.\d+\.(?:{_PARTS}|attn_q_norm|attn_k_norm))\.weight"),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PACK_TOKENS = 768  # rows are packed up to this many tokens: beyond it the masked part of attention costs more than it saves
WARM_UP = 0.1  # share of the steps
CLIP_NORM = 1.0
EFFICIENCY = 0.4  # share of the matrix products' speed that a whole step reaches, as measured
LIBRARIES_BYTES = 900 << 20  # what the process holds before a model is loaded


# --- the model -------------------------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank change."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.frozen, self.scale, self.dropout = frozen, alpha / rank, dropout
        self.a = nn.Parameter(torch.empty(rank, frozen.in_features))
        self.b = nn.Parameter(torch.zeros(frozen.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = F.linear(inner, self.a.to(x.dtype))
        return self.frozen(x) + F.linear(low, (self.b * self.scale).to(x.dtype))  # type: ignore[no-any-return]

    def delta(self) -> Tensor:
        """The change of W, (out, in) float32."""
        return self.scale * (self.b.detach() @ self.a.detach())


def model_config(base: gguf.GgufFile) -> Any:
    """The transformers configuration that a GGUF's keys describe.

    Raises:
        FineTuningNotSupportedError: an architecture or a variant of it that training does not cover, named.
        ArtifactError: a key that is missing.
    """
    if base.architecture not in ARCHITECTURES:
        raise FineTuningNotSupportedError(
            f"{base.path.name}: architecture {base.architecture or '(none)'} can't be trained; {', '.join(ARCHITECTURES)} can",
            hint="choose another base model, or leave the fallback on to make a model set",
        )
    for key, why in (("expert_count", "experts"), ("rope.scaling.type", "scaled positions")):
        value = base.keys.get(f"{base.architecture}.{key}")
        if value not in (None, 0, "none"):
            raise FineTuningNotSupportedError(f"{base.path.name}: {base.architecture} with {why} ({value}) can't be trained")
    _refuse_variants(base)
    heads = int(base.number("attention.head_count"))
    hidden = int(base.number("embedding_length"))
    return ARCHITECTURES[base.architecture][0](
        vocab_size=base.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=int(base.number("feed_forward_length")),
        num_hidden_layers=int(base.number("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(base.number("attention.head_count_kv", heads)),
        head_dim=int(base.number("attention.key_length", hidden // heads)),
        rms_norm_eps=base.number("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": base.number("rope.freq_base", 10000.0)},
        max_position_embeddings=int(base.number("context_length")),
        tie_word_embeddings="output.weight" not in base.tensors,
        use_cache=False,
    )


def _refuse_variants(base: gguf.GgufFile) -> None:
    """
    Raises:
        FineTuningNotSupportedError: parts that the model in PyTorch would not have, so that it would learn on something else.
    """
    extra = next((name for name in base.tensors if not _KNOWN_TENSORS[base.architecture].fullmatch(name)), None)
    if extra is not None:
        raise FineTuningNotSupportedError(f"{base.path.name}: {base.architecture} with a tensor {extra} can't be trained")
    unread = next((info for info in base.tensors.values() if not gguf.readable(info.type)), None)
    if unread is not None:
        raise FineTuningNotSupportedError(f"{base.path.name}: weights of type {unread.type.name} can't be trained on")
    width = base.number("embedding_length") // max(base.number("attention.head_count"), 1)
    head = base.number("attention.key_length", width)
    if base.number("rope.dimension_count", head) != head:
        raise FineTuningNotSupportedError(f"{base.path.name}: {base.architecture} with positions in a part of each head can't be trained")


def load_model(base: gguf.GgufFile, dtype: torch.dtype) -> nn.Module:
    """The model with the file's weights, dequantised to `dtype`, frozen, in eval mode.

    Raises:
        FineTuningNotSupportedError: see `model_config`.
        ArtifactError: a tensor that is missing or has another shape.
    """
    config = model_config(base)
    with torch.device("meta"):
        model: Any = ARCHITECTURES[base.architecture][1]._from_config(config, attn_implementation="sdpa", dtype=dtype)
    weights = {}
    for parameter, placeholder in model.state_dict().items():
        name = gguf.tensor_name(parameter)
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name not in base.tensors:
            raise ArtifactError(f"{base.path}: tensor {name} is missing")
        values = base.dequantised(name)
        if values.shape != tuple(placeholder.shape):
            raise ArtifactError(f"{base.path}: tensor {name} has shape {values.shape}, not {tuple(placeholder.shape)}")
        order = gguf.row_order(base, name)
        if order is not None:
            restored = torch.empty(values.shape)
            restored[torch.from_numpy(order)] = torch.from_numpy(values)
            weights[parameter] = restored.to(dtype)
        else:
            weights[parameter] = torch.from_numpy(values).to(dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    if "rope_freqs.weight" in base.tensors:  # Llama 3.1's scaling is a tensor here, not a key
        model.model.rotary_emb.inv_freq /= torch.from_numpy(base.dequantised("rope_freqs.weight"))
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def add_lora(model: nn.Module, config: TrainConfig, seed: int) -> dict[str, LoraLinear]:
    """Puts a LoRA on every linear layer of the blocks; tensor name -> layer, in the model's order. Seeds first."""
    torch.manual_seed(seed)
    layers = {}
    for path, module in list(model.named_modules()):
        parent, _, last = path.rpartition(".")
        if last in TARGETS and isinstance(module, nn.Linear):
            layer = LoraLinear(module, config.rank, config.alpha, config.dropout)
            setattr(model.get_submodule(parent), last, layer)
            layers[gguf.tensor_name(f"{path}.weight")] = layer
    return layers


# --- rows to tensors -------------------------------------------------------------------------------------------------


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


# --- training --------------------------------------------------------------------------------------------------------


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
        try:
            for pack in packs:
                loss = pack_loss(self.model, pack) / answers
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            norm = float(nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM))
        except MemoryError as error:
            raise TrainingFailedError("training ran out of memory", hint="a smaller base model or shorter rows need less") from error
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            raise TrainingFailedError("training ran out of memory", hint="a smaller base model or shorter rows need less") from error
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
        """(mean loss an answer token, share of rows whose rating a greedy answer gets right)."""
        self.model.eval()
        total, count, right = 0.0, 0, 0
        for group in pack_rows(rows, self.shared):
            pack = make_pack(group, self.shared)
            logits = answer_logits(self.model, pack)
            total += float(F.cross_entropy(logits, pack.labels, reduction="sum"))
            count += len(pack.labels)
            for number, row in enumerate(group):
                places = torch.nonzero((pack.row == number) & pack.decides).flatten().tolist()
                right += all(
                    int(logits[place][list(allowed)].argmax()) == allowed.index(int(pack.labels[place]))
                    for place, allowed in zip(places, row.branches, strict=True)
                )
        return total / count, right / len(rows)

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


def peak_memory_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
