"""Feed-forward of many experts over weights prepared once, for inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeforge.kernels.fp8_weight import Fp8Weight
from moeforge.kernels.linear import TILE_ROWS, PreparedWeight, can_panel, panels
from moeforge.kernels.native import PANEL, NativeExperts
from moeforge.kernels.permute import combine, expert_permutation, expert_rows, gather
from moeforge.kernels.swiglu import swiglu_forward, swiglu_invariant


class PreparedExperts:
    """Experts for inference on a CPU: the weights of each one, prepared (see `PreparedWeight`).

    w13 [E, 2F, D] gate rows first, w2 [E, D, F], on activations of `dtype`.
    """

    def __init__(
        self, w13: Tensor | Fp8Weight, w2: Tensor | Fp8Weight, dtype: torch.dtype, deterministic: bool = False
    ) -> None:
        ups, downs = _matrices(w13), _matrices(w2)
        self.deterministic, self.num_experts = deterministic, len(ups)
        self.native: NativeExperts | None = None
        self._prepared: list[tuple[PreparedWeight, PreparedWeight]] = []
        if ups and all(_takes(down, dtype) and can_panel(up, dtype) for up, down in zip(ups, downs, strict=True)):
            self.native = NativeExperts([panels(up, gated=True) for up in ups], [panels(down) for down in downs])
        else:
            self._prepared = [
                (PreparedWeight(up, dtype, deterministic), PreparedWeight(down, dtype, deterministic))
                for up, down in zip(ups, downs, strict=True)
            ]

    def __call__(self, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """As `expert_mlp`."""
        rows_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
        experts_R = torch.repeat_interleave(torch.arange(self.num_experts), rows_E)
        return self.routed(x_RD, torch.ones(len(x_RD), 1), experts_R[:, None])

    def routed(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """Sum over k of weights_TK times the output of expert experts_TK (int64) for each token: [T, D].

        The native library does all of it in one call, and adds in float32; otherwise tokens are sorted by expert first.
        """
        if self.native is not None:
            return self.native.routed(x_TD, weights_TK, experts_TK)
        permutation = expert_permutation(experts_TK, self.num_experts, alignment=self._alignment(experts_TK.numel()))
        x_RD = gather(x_TD, permutation)
        y_RD = torch.empty_like(x_RD)
        activation = swiglu_invariant if self.deterministic else swiglu_forward
        for (w13, w2), rows in zip(self._prepared, expert_rows(permutation.offsets_E), strict=True):
            if rows.stop > rows.start:
                y_RD[rows] = w2.linear(activation(w13.linear(x_RD[rows])))
        return combine(y_RD, weights_TK, permutation)

    def _alignment(self, assignments: int) -> int:
        """Rows at whose multiples an expert's group starts."""
        if self.deterministic:
            return TILE_ROWS  # groups are whole tiles
        # Few rows are taken as they are; of many, padding costs less than code for each number of rows.
        rows = assignments // self.num_experts
        return 1 if rows <= 16 else 8 if rows <= 64 else 32


def _takes(w2: Tensor | Fp8Weight, dtype: torch.dtype) -> bool:
    """Whether the native experts take this w2 [D, F]: whole panels of both."""
    shape = (w2.values if isinstance(w2, Fp8Weight) else w2).shape
    return can_panel(w2, dtype) and shape[0] % PANEL == shape[1] % PANEL == 0


def _matrices(weight: Tensor | Fp8Weight) -> Sequence[Tensor | Fp8Weight]:
    return weight.unbind()
