"""How a rank holds its part of an FP8 matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeforge.config.quantization import Activations, QuantizationConfig, Scales
from moeforge.kernels.fp8 import E4M3
from moeforge.kernels.fp8_weight import BLOCK, GROUP_ROWS, Fp8Weight


@dataclass(frozen=True)
class Fp8Matrix:
    """Scales and activations of a matrix [..., N, K], of which a rank's part begins at the global `first_column`.

    `aligned`: where rows with different scales meet is at a multiple of GROUP_ROWS of the part; otherwise every row has
    its scale.
    """

    scales: Scales
    activations: Activations
    first_column: int = 0
    aligned: bool = True

    @classmethod
    def of(
        cls, quantization: QuantizationConfig | None, first_column: int = 0, aligned: bool = True
    ) -> Fp8Matrix | None:
        """None for a matrix that is not quantised."""
        if quantization is None:
            return None
        return cls(quantization.scales, quantization.activations, first_column, aligned)

    def block_range(self, columns: int) -> tuple[int, int]:
        """The columns of the global scales [.., k] that K columns touch."""
        if self.scales != "block128":
            return 0, 1
        return self.first_column // BLOCK, -(-(self.first_column + columns) // BLOCK)

    def scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """n and k of the scales of [N, K]."""
        begin, end = self.block_range(columns)
        each_row = self.scales == "channel" or not self.aligned
        return rows if each_row else -(-rows // GROUP_ROWS), end - begin

    def parameters(self, *shape: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
        """Values, scales and input scale of a matrix of this shape, uninitialised."""
        *stack, rows, columns = shape
        values = torch.empty(shape, dtype=E4M3)
        scales = torch.empty(*stack, *self.scales_shape(rows, columns), dtype=torch.float32)
        fixed = torch.empty((), dtype=torch.float32) if self.activations == "static" else None
        return _constant(values), _constant(scales), None if fixed is None else _constant(fixed)

    def weight(self, values: Tensor, scales: Tensor) -> Fp8Weight:
        """The parameters as kernels take them."""
        return Fp8Weight(values, scales, self.first_column % BLOCK)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
