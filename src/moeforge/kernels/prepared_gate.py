"""The gate for inference: from a token's hidden state to its experts and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.kernels import native
from moeforge.kernels.backend import use_triton
from moeforge.kernels.gate import MIN_STD, gate
from moeforge.kernels.linear import PreparedWeight
from moeforge.kernels.native import NativeGate
from moeforge.kernels.precision import widen

_FUSED_EXPERTS, _FUSED_WEIGHTS = 256, 1 << 19
"""At most, of a router whose matmul is Triton's: a program reads all of it, and a decode step may have one only."""


class PreparedGate:
    """Logits x W^T + b in float32 (float64 for float64) of activations of `dtype`, then `gate`.

    weight [E, D], bias [E] or None. `deterministic` as for `PreparedWeight`. 16-bit activations need no wide copy where
    all is done in one call: by the native library for bf16 on CPUs, by Triton on GPUs unless the router is large.
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
        self._choice = top_k, scale, renormalize
        self._bias = None if bias is None else widen(bias).contiguous()
        self.native: NativeGate | None = None
        self._fused: Tensor | None = None
        self._prepared: PreparedWeight | None = None
        if dtype == torch.bfloat16 and weight.device.type == "cpu" and native.library() is not None:
            self.native = NativeGate(widen(weight).contiguous(), self._bias, top_k, scale, renormalize)
        elif _fuses(weight, dtype):
            self._fused = weight.contiguous()
        else:
            wide = widen(weight)
            self._prepared = PreparedWeight(wide, wide.dtype, deterministic)

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (float32 or float64) and experts (int64) of each token [T, K], in falling order of the logits."""
        if self.native is not None:
            return self.native.choose(x_TD)
        if self._fused is not None:
            from moeforge.kernels.triton.gate import route

            return route(x_TD, self._fused, self._bias, *self._choice, MIN_STD)
        assert self._prepared is not None
        chosen = gate(self._prepared.linear(widen(x_TD), self._bias), *self._choice)
        return chosen.weights, chosen.experts


def _fuses(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether Triton takes this weight [E, D] and activations of `dtype`; float32 ones need no wide copy anyway."""
    few = weight.shape[0] <= _FUSED_EXPERTS and weight.numel() <= _FUSED_WEIGHTS
    return use_triton(weight) and weight.dtype == dtype and dtype.itemsize == 2 and few
