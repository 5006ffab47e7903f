"""Cross-entropy of a linear head whose vocabulary rows are spread over ranks, without keeping the logits.

The scheme of `kernels.cross_entropy`, with maximum, sum and target logit of each row found over the ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.kernels.cross_entropy import with_gradients
from moeforge.kernels.precision import widen
from moeforge.parallel.group import Group

# Rows of logits that exist at once.
_CHUNK = 1024


@torch.no_grad()
def _loss_and_gradients(
    x_TD: Tensor, weight_vD: Tensor, targets_T: Tensor, begin: int, group: Group, ignore: int, wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    loss = torch.zeros((), dtype=widen(x_TD[:0]).dtype, device=x_TD.device)
    grad_x = torch.zeros_like(x_TD) if wanted else None
    grad_weight = torch.zeros_like(weight_vD) if wanted else None
    for start in range(0, x_TD.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        logits = x_TD[part] @ weight_vD.t()
        chunk_loss, grad = _softmax_minus_target(logits, targets_T[part], begin, group, ignore, keep=wanted)
        loss += chunk_loss
        if grad is not None and grad_x is not None and grad_weight is not None and weight_vD.shape[0]:
            torch.mm(grad, weight_vD, out=grad_x[part])
            grad_weight.addmm_(grad.t(), x_TD[part])
    return loss, grad_x, grad_weight


def _softmax_minus_target(
    logits: Tensor, targets: Tensor, begin: int, group: Group, ignore: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of logits [R, v] (this rank's columns, from `begin`), which are overwritten; with `keep` also their
    gradients, in the logits' type."""
    wide = widen(logits)
    rows, columns = wide.shape
    valid = (targets != ignore).to(wide.dtype).unsqueeze(1)
    local = (targets - begin).unsqueeze(1)
    mine = (local >= 0) & (local < columns) & (valid > 0)
    if columns:
        highest, index = wide.amax(1, keepdim=True), local.clamp(0, columns - 1)
        picked = wide.gather(1, index) * mine
    else:
        highest, index = wide.new_full((rows, 1), -torch.inf), local
        picked = wide.new_zeros(rows, 1)
    highest = group.maximum_(highest)
    exponent = wide.sub_(highest).exp_()
    total, picked = group.all_reduce(torch.cat([exponent.sum(1, keepdim=True), picked], 1)).split(1, 1)
    loss = ((highest + total.log() - picked) * valid).sum()
    if not keep:
        return loss, None
    grad = exponent.mul_(valid / total)
    if columns:
        grad.scatter_add_(1, index, -mine.to(wide.dtype))
    return loss, grad.to(logits.dtype)


def vocab_parallel_cross_entropy(
    x_TD: Tensor, weight_vD: Tensor, targets_T: Tensor, begin: int, group: Group, ignore: int = -100
) -> Tensor:
    """Sum over tokens of -log softmax(x W^T)[target], W's rows spread over the ranks of `group`; this one's start at
    vocabulary id `begin`, and there may be none.

    x_TD and targets_T are the same on every rank, and so is the result, a scalar in float32 (float64 for float64
    inputs). The gradient of x_TD is this rank's part of it.
    """
    wanted = torch.is_grad_enabled() and (x_TD.requires_grad or weight_vD.requires_grad)
    loss, *gradients = _loss_and_gradients(x_TD, weight_vD, targets_T, begin, group, ignore, wanted)
    return with_gradients(loss, *zip((x_TD, weight_vD), gradients, strict=True))
