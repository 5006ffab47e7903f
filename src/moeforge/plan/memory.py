"""Bytes that a unit's weights, gradients and optimizer state take while training.

Legend: D hidden, F FFN, E experts, H heads, G KV groups, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.layout import unit_names


@dataclass(frozen=True)
class BytesPerParameter:
    """Bytes a parameter, kept through the step. Activations and temporary buffers are not counted."""

    weights: int
    gradients: int
    optimizer: int


# bf16: bf16 weights; gradients summed in fp32; fp32 masters and two fp32 moments. The others keep one format.
_ADAMW = {
    "bf16": BytesPerParameter(2, 4, 12),
    "bf16_pure": BytesPerParameter(2, 2, 4),
    "fp32": BytesPerParameter(4, 4, 8),
    "fp64": BytesPerParameter(8, 8, 16),
}
# Plain SGD has no moments: only bf16's fp32 masters remain.
_SGD = {
    name: BytesPerParameter(each.weights, each.gradients, 4 if name == "bf16" else 0) for name, each in _ADAMW.items()
}
_ACCOUNTING = {"adamw": _ADAMW, "sgd": _SGD}


@dataclass(frozen=True)
class UnitMemory:
    """Parameters and bytes of one unit, held whole by one process."""

    unit: str
    kind: str
    params: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and optimizer state together."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def bytes_per_parameter(precision: str, optimizer: str = "adamw") -> BytesPerParameter:
    """The accounting for a precision (bf16, bf16_pure, fp32, fp64) and an optimizer (adamw, sgd).

    Raises UserError for any other.
    """
    if optimizer not in _ACCOUNTING:
        raise UserError(f'optimizer.kind = "{optimizer}": must be one of {", ".join(_ACCOUNTING)}')
    table = _ACCOUNTING[optimizer]
    if precision not in table:
        raise UserError(f'model.precision = "{precision}": must be one of {", ".join(table)}')
    return table[precision]


def unit_memory(config: ModelConfig, precision: str, optimizer: str = "adamw") -> tuple[UnitMemory, ...]:
    """Every unit in forward order; the parameters sum to `config.parameters()`.

    A matrix that embedding and head share is counted with the embedding. Errors as in `bytes_per_parameter`.
    """
    each = bytes_per_parameter(precision, optimizer)
    found = []
    for unit in unit_names(config):
        kind, params = _unit(config, unit)
        sizes = (params * each.weights, params * each.gradients, params * each.optimizer)
        found.append(UnitMemory(unit, kind, params, *sizes))
    return tuple(found)


def _unit(config: ModelConfig, unit: str) -> tuple[str, int]:
    """A unit's kind (embed, attention, dense ffn, experts, head) and number of parameters."""
    hidden = config.hidden_size
    vocabulary = config.vocab_size * hidden
    if unit == "embed":
        return unit, vocabulary
    if unit == "head":
        return unit, hidden + (0 if config.tie_embeddings else vocabulary)
    _, layer, part = unit.split(".")
    if part == "attention":
        return part, hidden + _attention(config)
    if config.moe is None or not config.is_moe_layer(int(layer)):
        return "dense ffn", hidden + 3 * hidden * config.ffn_size
    moe = config.moe
    router = moe.num_experts * (hidden + moe.router_bias) + moe.gate_norm_learned
    return "experts", hidden + router + moe.num_experts * 3 * hidden * moe.expert_size


def _attention(config: ModelConfig) -> int:
    """[(H + 2 G) hd, D] in, [D, H hd] out, biases and q/k norms."""
    hidden, hd = config.hidden_size, config.head_dim
    heads, groups = config.num_heads, config.num_kv_heads
    qkv = (heads + 2 * groups) * hd
    norms = {"none": 0, "head": 2 * hd, "full": (heads + groups) * hd}[config.qk_norm]
    matrices = qkv * hidden + heads * hd * hidden
    return matrices + qkv * config.qkv_bias + hidden * config.output_bias + norms
