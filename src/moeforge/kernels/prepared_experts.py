"""Feed-forward of many experts over weights prepared once, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.kernels.linear import PreparedWeight
from moeforge.kernels.swiglu import swiglu_forward, swiglu_invariant


class PreparedExperts:
    """Experts for inference: the weights of each one, prepared (see `PreparedWeight`).

    w13 [E, 2F, D] gate rows first, w2 [E, D, F].
    """

    def __init__(self, w13: Tensor, w2: Tensor, deterministic: bool = False) -> None:
        self._activation = swiglu_invariant if deterministic else swiglu_forward
        self._w13 = [PreparedWeight(weight, deterministic) for weight in w13.unbind()]
        self._w2 = [PreparedWeight(weight, deterministic) for weight in w2.unbind()]

    def __call__(self, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """As `expert_mlp`. Reads the offsets on the host, so it is for the CPU."""
        out = torch.empty_like(x_RD)
        begin = 0
        for w13, w2, end in zip(self._w13, self._w2, offsets_E.tolist(), strict=True):
            if end > begin:
                out[begin:end] = w2.linear(self._activation(w13.linear(x_RD[begin:end])))
            begin = end
        return out
