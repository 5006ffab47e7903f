"""The gate for inference: from a token's hidden state to its experts and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.kernels import native
from moeforge.kernels.gate import gate
from moeforge.kernels.linear import PreparedWeight
from moeforge.kernels.precision import widen


class PreparedGate:
    """Logits x W^T + b in float32 (float64 for float64) of activations of `dtype`, then `gate`.

    weight [E, D], bias [E] or None. `deterministic` as for `PreparedWeight`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        top_k: int,
        scale: float | None,
        renormalize: bool,
        dtype: torch.dtype,
        deterministic: bool = False,
    ) -> None:
        self.top_k, self.scale, self.renormalize = top_k, scale, renormalize
        self._native = dtype == torch.bfloat16 and weight.device.type == "cpu" and native.library() is not None
        self._weight, self._bias = widen(weight).contiguous(), None if bias is None else widen(bias).contiguous()
        self._prepared = None if self._native else PreparedWeight(self._weight, self._weight.dtype, deterministic)

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (float32 or float64) and experts (int64) of each token [T, K], in falling order of the logits."""
        if self._prepared is None:
            return native.choose_experts(x_TD, self._weight, self._bias, self.top_k, self.scale, self.renormalize)
        chosen = gate(self._prepared.linear(widen(x_TD), self._bias), self.top_k, self.scale, self.renormalize)
        return chosen.weights, chosen.experts
