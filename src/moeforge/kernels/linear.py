"""Linear maps over plain weights, or over weights prepared once for many small calls.

A plain matmul on CPU arranges the weight anew at every call; with few rows that costs more than the matmul. Prepared
weights are kept in the native library's panels (bf16 and FP8), or in oneDNN's own arrangement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import native
from moeforge.kernels.fp8_linear import fp8_linear
from moeforge.kernels.fp8_weight import Activations, Fp8Weight
from moeforge.kernels.native import NativeWeight

TILE_ROWS = 16
"""Rows of every call of a deterministic weight: a row's sum is then made in the same order in any company."""


class PreparedWeight:
    """A weight [N, K] for inference on activations of `dtype`: in panels or packed where the CPU can, else as it is.

    `deterministic`: the bits of a row do not depend on how many others there are. So they are in panels; in any other
    arrangement all calls are made of TILE_ROWS rows. `activations` and `input_scale` are an FP8 weight's, see
    `fp8_linear`. The weight given may be freed where it was copied.
    """

    def __init__(
        self,
        weight: Tensor | Fp8Weight,
        dtype: torch.dtype,
        deterministic: bool = False,
        activations: Activations = "none",
        input_scale: Tensor | None = None,
    ) -> None:
        self.deterministic = deterministic
        self._activations, self._input_scale = activations, input_scale
        self.native: NativeWeight | None = None
        self._packed: Tensor | None = None
        self._plain: Tensor | Fp8Weight | None = None
        if can_panel(weight, dtype) and activations == "none":
            self.native = panels(weight)
        elif isinstance(weight, Tensor) and can_pack(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        else:
            self._plain = weight

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias; x [R, K] -> [R, N]."""
        if self.native is not None:
            return self.native.linear(x, bias)
        if not self.deterministic:
            return self._call(x, bias)
        return torch.cat([self._call(tile, bias) for tile in _tiles(x)])[: x.shape[0]]

    def _call(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, bias, "none", [], "")
        if isinstance(self._plain, Fp8Weight):
            y = fp8_linear(x, self._plain, self._activations, self._input_scale)
            return y if bias is None else y + bias
        assert self._plain is not None
        return F.linear(x, self._plain, bias)


Weight = Tensor | PreparedWeight


def can_panel(weight: Tensor | Fp8Weight, dtype: torch.dtype) -> bool:
    """Whether the native library takes this weight and activations of `dtype`."""
    if isinstance(weight, Fp8Weight):
        values, whole = weight.values, weight.values.shape[1] % 4 == weight.column_offset % 4 == 0
    else:
        values, whole = weight, weight.dtype == dtype and weight.shape[1] % 2 == 0
    return (
        dtype == torch.bfloat16
        and whole
        and values.device.type == "cpu"
        and values.numel() > 0
        and native.library() is not None
    )


def panels(weight: Tensor | Fp8Weight, gated: bool = False) -> NativeWeight:
    """The weight in the native library's arrangement; `gated` as there."""
    if isinstance(weight, Fp8Weight):
        return NativeWeight(weight.values, weight.scales, weight.column_offset, gated)
    return NativeWeight(weight, gated=gated)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has an arrangement of its own for this weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not weight.numel():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias; x [R, K], weight [N, K] plain (with a gradient) or prepared."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.linear(x, bias)


def _tiles(x: Tensor) -> list[Tensor]:
    """x [R, K] as pieces of TILE_ROWS rows, the last filled up with zeros; one piece even of no rows."""
    missing = -x.shape[0] % TILE_ROWS if x.shape[0] else TILE_ROWS
    return list((F.pad(x, (0, 0, 0, missing)) if missing else x).split(TILE_ROWS))
