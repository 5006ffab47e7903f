"""Rounding of one weight in which each column makes up for the errors of those before it.

Legend: N rows, K columns, R inputs, B columns of a block.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from moeforge.kernels.fp8 import E4M3, to_e4m3

_DAMPING = 0.01  # at least, as a share of the mean of H's diagonal
_COLUMNS = 128  # errors of earlier ones are fed back by one product, those of the last ones column by column


class Feedback(NamedTuple):
    """What `gptq` knows of inputs: the `order` [K] of their columns, and in that order, strictly lower triangular
    [K, K], what of the error of column i column k takes on."""

    order: Tensor
    matrix: Tensor


class Feedbacks:
    """The feedback of inputs, and of those last asked for: q, k and v have the same, and gate and up."""

    def __init__(self) -> None:
        self._last: deque[tuple[Tensor, Feedback]] = deque(maxlen=2)

    def of(self, inputs_RK: Tensor) -> Feedback:
        """As `feedback`; the inputs are remembered by identity."""
        for inputs, found in self._last:
            if inputs is inputs_RK:
                return found
        self._last.append((inputs_RK, feedback(inputs_RK)))
        return self._last[-1][1]


def gptq(weight_NK: Tensor, scales_NK: Tensor, known: Feedback) -> Tensor:
    """e4m3 values [N, K] that bring `inputs (values * scales)^T` near `inputs weight^T`: GPTQ (Frantar et al. 2022), of
    which this is the form of Chee et al. 2023 (QuIP, section 4): it minimises the error E of a row as tr(E H E^T),
    H = inputs^T inputs, one column after another, those of the largest inputs first.

    `known`: the `feedback` of the inputs. All finite and on one device; computed in float32. What lies beyond the
    largest value saturates, which later columns make up for too. Columns whose inputs are all zero, and all columns
    where there are no inputs, are rounded to nearest.
    """
    order, feedback_KK = known
    weight_KN, scales_KN = weight_NK.float().T[order], scales_NK.T[order]
    error_KN, values_KN = torch.zeros_like(weight_KN), torch.empty_like(weight_KN, dtype=E4M3)
    for begin in range(0, len(order), _COLUMNS):
        block = slice(begin, begin + _COLUMNS)
        target_BN = weight_KN[block].addmm(feedback_KK[block, :begin], error_KN[:begin])
        for k, target_N in enumerate(target_BN, begin):
            target_N = target_N + feedback_KK[k, begin:k] @ error_KN[begin:k]
            values_KN[k] = to_e4m3(target_N / scales_KN[k])
            error_KN[k] = weight_KN[k] - values_KN[k].float() * scales_KN[k]
    return values_KN[order.argsort()].T.contiguous()


def feedback(inputs_RK: Tensor) -> Feedback:
    """H = U U^T with U upper triangular, so that tr(E H E^T) = |E U|^2, whose column k, E_k U_kk + sum_(i<k) E_i U_ik,
    is smallest for the target weight_k + sum_(i<k) error_i U_ik / U_kk, with error = -E."""
    count, columns = inputs_RK.shape
    inputs_RK = inputs_RK.float()
    if count:
        inputs_RK = inputs_RK / inputs_RK.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)  # squares are finite
    hessian_KK = inputs_RK.T @ inputs_RK
    order = hessian_KK.diagonal().argsort(descending=True)
    backwards = hessian_KK[order.flip(0)][:, order.flip(0)]
    # The fewer the inputs, the less they know of how columns go together, and the smaller the feedback must be. Of 0.1,
    # 0.3, 1 and 3 times K / R, this share makes errors smallest on text that was not calibrated on (SmolLM2).
    damping = max(_DAMPING, columns / max(count, 1)) * (hessian_KK.diagonal().mean().item() or 1.0)
    while True:
        damped = backwards + damping * torch.eye(columns, device=backwards.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping *= 10
    upper = lower.flip(0, 1)
    return Feedback(order, (upper / upper.diagonal()).T.tril(-1))
