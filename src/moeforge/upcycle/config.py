"""What an upcycling run is asked for, checked before any weight is read.

Legend: D hidden, F dense FFN width, E experts, K top-k, G granularity (shards of one FFN copy).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import UserError

Method = Literal["copy", "noise", "drop", "virtual-group"]
Scaling = Literal["down", "cube-root", "none"]
Shared = Literal["first", "average"]
StoredType = Literal["keep", "bf16", "fp32"]


@dataclass(frozen=True)
class UpcycleConfig:
    """How a dense model becomes a mixture of experts. docs/upcycling.md explains every method.

    `num_experts` and `top_k` count the experts of the result. `gate_norm` is lambda of the gating-logit normalisation,
    None for plain softmax, "auto" for 1.0 where it is defined (E >= 3) and weights are renormalised; with
    `gate_norm_learned` it is the start of one parameter a layer. `granularity` (virtual-group only) cuts each of the
    E / G copies of the FFN into G experts; None takes G = K, one whole copy a token. `noise_std` is a share of each
    matrix's own standard deviation; `noise_fraction` and `drop_ratio` are shares of the F intermediate units. `dtype`
    "keep" writes what is stored (GGUF weights come as float32).
    """

    num_experts: int = 8
    top_k: int = 2
    method: Method = "copy"
    gate_norm: float | Literal["auto"] | None = "auto"
    gate_norm_learned: bool = False
    seed: int = 0
    layer_frequency: int = 1
    granularity: int | None = None
    scaling: Scaling = "down"
    renormalize: bool = True
    noise_std: float = 0.01
    noise_fraction: float = 1.0
    drop_ratio: float = 0.5
    router_std: float = 0.02
    shared: Shared = "average"
    dtype: StoredType = "keep"

    def __post_init__(self) -> None:
        for key, kind in (
            ("method", Method),
            ("scaling", Scaling),
            ("shared", Shared),
            ("dtype", StoredType),
        ):
            value, allowed = getattr(self, key), get_args(kind)
            if value not in allowed:
                raise UserError(f"upcycle {key} = {value!r}: must be one of {', '.join(allowed)}")
        self._positive("router_std", "a zero router sends every token to the same experts and never leaves them")
        self._positive("noise_std", "a share of each matrix's standard deviation")
        for key in ("noise_fraction", "drop_ratio"):
            if not 0 < getattr(self, key) <= 1:
                raise UserError(f"upcycle {key} = {getattr(self, key)}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"upcycle seed = {self.seed}: must be between 0 and 2**63 - 1")
        if self.num_experts < 2:
            raise UserError(f"upcycle num_experts = {self.num_experts}: must be at least 2")
        self._check_granularity()

    def _positive(self, key: str, why: str) -> None:
        value = getattr(self, key)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"upcycle {key} = {value}: must be a positive number ({why})")

    def _check_granularity(self) -> None:
        g = self.shards
        if self.method != "virtual-group" and g != 1:
            raise UserError(f"upcycle granularity = {g}: only --method virtual-group cuts experts, not {self.method}")
        if g < 1 or self.num_experts % g:
            raise UserError(f"upcycle granularity = {g}: must divide num_experts ({self.num_experts})")
        if self.top_k % g:
            raise UserError(f"upcycle granularity = {g}: must divide top_k ({self.top_k}): tokens use whole copies")

    @property
    def shards(self) -> int:
        """G: experts that one copy of the dense FFN is cut into (1 except for virtual-group)."""
        if self.granularity is not None:
            return self.granularity
        return self.top_k if self.method == "virtual-group" else 1

    @property
    def copies(self) -> int:
        """E / G: whole copies of the dense FFN in a layer."""
        return self.num_experts // self.shards

    @property
    def output_scale(self) -> float:
        """Factor on an expert's output that restores the dense output (He et al. 2024, arXiv 2410.07524).

        Renormalised weights sum to 1 over the K/G chosen copies and each shard has 1/G of its copy's
        weight: G. Otherwise a token's weights sum to about K / E while the logits are small: (E/G) G^2 / K,
        approximately.
        """
        g = self.shards
        return float(g) if self.renormalize else self.copies * g * g / self.top_k

    @property
    def gate_scale(self) -> float | None:
        """lambda of the result's gate normalisation, "auto" resolved."""
        default = 1.0 if self.num_experts >= 3 and self.renormalize else None
        return default if self.gate_norm == "auto" else self.gate_norm

    def preserves_function(self, donors: int = 1) -> bool:
        """Whether the result computes what the dense model computes, up to rounding."""
        exact_scale = self.scaling == "down" or self.output_scale == 1
        return self.method in ("copy", "virtual-group") and self.renormalize and exact_scale and donors == 1

    def model_config(self, dense: ModelConfig) -> ModelConfig:
        """The result's configuration. UserError for what the router or the FFN width cannot be."""
        if dense.moe is not None:
            raise UserError(f"upcycle source: is already a mixture of {dense.moe.num_experts} experts; must be dense")
        if dense.ffn_size % self.shards:
            raise UserError(f"upcycle granularity = {self.shards}: must divide the dense FFN width ({dense.ffn_size})")
        if self.layer_frequency > dense.num_layers:
            raise UserError(
                f"upcycle layer_frequency = {self.layer_frequency}: the model has {dense.num_layers} layers"
            )
        moe = MoEConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_size=dense.ffn_size // self.shards,
            gate_norm=self.gate_scale,
            gate_norm_learned=self.gate_norm_learned,
            renormalize=self.renormalize,
            layer_frequency=self.layer_frequency,
        )
        return dataclasses.replace(dense, moe=moe)
