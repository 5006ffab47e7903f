"""Bytes that a unit's weights, gradients and optimizer state take while training."""

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
    """Every unit in forward order. Errors as in `bytes_per_parameter`."""
    each = bytes_per_parameter(precision, optimizer)
    found = []
    for unit in unit_names(config):
        params = config.unit_parameters(unit)
        sizes = (params * each.weights, params * each.gradients, params * each.optimizer)
        found.append(UnitMemory(unit, unit_kind(config, unit), params, *sizes))
    return tuple(found)


def unit_kind(config: ModelConfig, unit: str) -> str:
    """embed, attention, dense ffn, experts or head."""
    kind = unit.rpartition(".")[2]
    if kind != "ffn":
        return kind
    return "experts" if config.is_moe_layer(int(unit.split(".")[1])) else "dense ffn"
