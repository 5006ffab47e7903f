"""What a layout needs to know of a model; `moeforge.config.model.ModelConfig` fits."""

from __future__ import annotations

from typing import Protocol

FFN_BLOCK = 16
"""FFN columns move between ranks in blocks of 16: what tensor cores and packed formats want."""


class ExpertShape(Protocol):
    """What a layout needs to know of the routed experts."""

    @property
    def num_experts(self) -> int: ...
    @property
    def expert_size(self) -> int: ...


class ModelShape(Protocol):
    """What a layout needs to know of a model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def moe(self) -> ExpertShape | None: ...
    def is_moe_layer(self, layer: int) -> bool: ...
    def fingerprint(self) -> str: ...
