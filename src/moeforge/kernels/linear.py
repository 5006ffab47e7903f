"""Linear maps over plain weights, or over weights prepared once for many small calls.

A plain matmul on CPU arranges the weight anew at every call; with few rows that costs more than the matmul. Prepared
weights are kept in oneDNN's own arrangement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 16
"""Rows of every call of a deterministic weight: a row's sum is then made in the same order in any company."""


class PreparedWeight:
    """A weight [N, K] for inference: packed where oneDNN can and `pack` asks for it, else as it is. Of a few rows the
    call costs more than arranging them.

    `deterministic`: all calls are made of TILE_ROWS rows, so that the bits of a row do not depend on how many others
    there are. The weight given may be freed where `packed` is true.
    """

    def __init__(self, weight: Tensor, deterministic: bool = False, pack: bool = True) -> None:
        self.deterministic = deterministic
        self.packed = pack and can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias; x [R, K] -> [R, N]."""
        if not self.deterministic:
            return self._call(x, bias)
        return torch.cat([self._call(tile, bias) for tile in _tiles(x)])[: x.shape[0]]

    def _call(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self._weight, bias, "none", [], "")
        return F.linear(x, self._weight, bias)


Weight = Tensor | PreparedWeight


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
