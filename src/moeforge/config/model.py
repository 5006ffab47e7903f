"""The model's own configuration: plain frozen dataclasses, no torch, no pydantic.

Legend: D hidden, F FFN width, E experts, K top-k, H heads, G KV groups, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moeforge.config.quantization import QuantizationConfig
from moeforge.errors import UserError
from moeforge.layout import unit_names

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
QKNorm = Literal["none", "head", "full"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (rotate-half form). The scaling kinds are those of transformers' `rope_parameters`."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class MoEConfig:
    """Routed experts and their gate (SKYWORK section 2).

    `gate_norm` is lambda of z~ = lambda (z - mean) / std, or None for plain softmax gating; with
    `gate_norm_learned` it is the start of one parameter per layer. `layer_frequency` f makes the layers
    f-1, 2f-1, ... sparse; the others keep their dense feed-forward.
    """

    num_experts: int
    top_k: int
    expert_size: int
    gate_norm: float | None = None
    gate_norm_learned: bool = False
    router_bias: bool = False
    renormalize: bool = True
    layer_frequency: int = 1

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise UserError(f"moe.num_experts = {self.num_experts}: must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"moe.top_k = {self.top_k}: must be between 1 and the number of experts ({self.num_experts})"
            )
        if self.top_k == 1 and self.renormalize and self.num_experts > 1:
            raise UserError(
                "moe.top_k = 1 with moe.renormalize = true: the one weight is always 1, so the router would get "
                "no gradient; use top_k >= 2 or renormalize = false"
            )
        if self.gate_norm is not None:
            if self.num_experts < 3:
                raise UserError(
                    f"moe.gate_norm = {self.gate_norm} with moe.num_experts = {self.num_experts}: gate "
                    "normalisation needs at least 3 experts (with 2 its gradient is zero); use gate_norm = off"
                )
            if not (math.isfinite(self.gate_norm) and self.gate_norm > 0):
                raise UserError(f"moe.gate_norm = {self.gate_norm}: must be a positive number, or off")
        elif self.gate_norm_learned:
            raise UserError("moe.gate_norm_learned = true needs moe.gate_norm, its starting value")
        if self.layer_frequency < 1:
            raise UserError(f"moe.layer_frequency = {self.layer_frequency}: must be at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the function the weights compute. Sizes are global, never a rank's share."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_positions: int = 4096
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm = "none"
    sliding_window: int | None = None
    sliding_window_first_layer: int = 0
    moe: MoEConfig | None = None
    quantization: QuantizationConfig | None = None
    family: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads = {self.num_heads}: must be a multiple of num_kv_heads ({self.num_kv_heads})")

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def fp8(self, matrix: str) -> QuantizationConfig | None:
        """How a matrix (see `config.quantization`) is held in FP8, None where it is not."""
        q = self.quantization
        return None if q is None or matrix in q.kept else q

    def is_moe_layer(self, layer: int) -> bool:
        """Whether this layer's feed-forward is routed."""
        return self.moe is not None and (layer + 1) % self.moe.layer_frequency == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts, ascending."""
        return tuple(i for i in range(self.num_layers) if self.is_moe_layer(i))

    def window(self, layer: int) -> int | None:
        """How many positions back a token of this layer sees (itself included), None for all."""
        return self.sliding_window if layer >= self.sliding_window_first_layer else None

    def parameters(self, active: bool = False) -> int:
        """Number of weights; with `active`, only the K experts that one token uses."""
        return sum(self.unit_parameters(unit, active) for unit in unit_names(self))

    def unit_parameters(self, name: str, active: bool = False) -> int:
        """Weights of one unit ("embed", "layers.3.attention", "layers.3.ffn", "head"), `active` as in `parameters`.

        A matrix that embedding and head share is counted with the embedding.
        """
        d, hd = self.hidden_size, self.head_dim
        if name == "embed":
            return self.vocab_size * d
        if name == "head":
            return d + (0 if self.tie_embeddings else self.vocab_size * d)
        _, layer, part = name.split(".")
        if part == "attention":
            q, kv = self.num_heads * hd, self.num_kv_heads * hd
            qkv = q + 2 * kv
            norms = {"none": 0, "head": 2 * hd, "full": q + kv}[self.qk_norm]
            return d + qkv * (d + self.qkv_bias) + d * (q + self.output_bias) + norms
        if self.moe is None or not self.is_moe_layer(int(layer)):
            return d + 3 * d * self.ffn_size
        moe = self.moe
        router = moe.num_experts * (d + moe.router_bias) + moe.gate_norm_learned
        return d + router + (moe.top_k if active else moe.num_experts) * 3 * d * moe.expert_size

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping that `from_dict` reads back unchanged."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises UserError for a key that is unknown, missing or of the wrong type."""
        data = {"rope": {}, **data} if isinstance(data, dict) else data
        _check_fields(cls, data, "")
        _check_fields(RopeConfig, data["rope"], "rope.")
        moe = data.get("moe")
        if moe is not None:
            _check_fields(MoEConfig, moe, "moe.")
        quantization = data.get("quantization")
        if quantization is not None:
            _check_fields(QuantizationConfig, quantization, "quantization.")
            quantization = QuantizationConfig(**{**quantization, "kept": tuple(quantization.get("kept", ()))})
        return cls(
            **{
                **data,
                "rope": RopeConfig(**data["rope"]),
                "moe": None if moe is None else MoEConfig(**moe),
                "quantization": quantization,
                "eos_token_ids": tuple(data.get("eos_token_ids", ())),
            }
        )

    def fingerprint(self) -> str:
        """Short hash of what the weights depend on; plans carry it, so that they are not used on another model."""
        data = self.to_dict()
        for name in ("quantization", "family", "bos_token_id", "eos_token_ids"):
            del data[name]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


_KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
    str: (str, "text"),
}


def _check_fields(cls: type, data: Any, prefix: str) -> None:
    """UserError unless `data` is a mapping from fields of `cls` to values of their types (nested ones aside)."""
    if not isinstance(data, dict):
        raise UserError(f"{prefix.rstrip('.') or 'model'} = {data!r}: must be a mapping")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := [key for key in data if key not in fields]:
        raise UserError(f"{prefix}{unknown[0]}: unknown key; known are {', '.join(fields)}")
    hints = get_type_hints(cls)
    for name, known in fields.items():
        if name not in data:
            if known.default is known.default_factory is dataclasses.MISSING:
                raise UserError(f"{prefix}{name}: missing")
        elif allowed := _refused(data[name], hints[name]):
            raise UserError(f"{prefix}{name} = {data[name]!r}: must be {allowed}")


def _refused(value: Any, hint: Any) -> str | None:
    """What a field of this type may hold, if `value` is nothing of the kind; None if it is."""
    kind = hint
    if get_origin(hint) is UnionType:
        kind = get_args(hint)[0]
        if value is None:
            return None
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        each = get_args(kind)[0]
        right = isinstance(value, (list, tuple)) and not any(_refused(element, each) for element in value)
        return None if right else "a list of " + {int: "whole numbers", str: "names"}[each]
    if kind not in _KINDS:
        return None
    types, allowed = _KINDS[kind]
    right = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    return None if right else allowed
