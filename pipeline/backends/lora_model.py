"""The PyTorch model that a GGUF file describes, frozen, with LoRA layers put on it.

LoRA: Hu et al., 2021, arXiv 2106.09685. A frozen W gains (alpha / rank) * B @ A. The layer is written out here rather than taken from
a library: A and B stay float32 while the product runs in the model's type, and nothing else is copied.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pipeline.backends import gguf
from pipeline.config import TrainConfig
from pipeline.errors import ArtifactError, FineTuningNotSupportedError

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
