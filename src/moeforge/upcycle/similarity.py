"""Expert similarity: the health measure of upcycled models (SKYWORK section 3).

Legend: D hidden, F FFN width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def expert_similarity(w13: Tensor, w2: Tensor) -> Tensor:
    """Mean pairwise cosine of a layer's experts, each flattened to [w1, w3, w2]; a scalar on the weights'
    device.

    w13 [E, 2F, D], w2 [E, D, F]. 1 for equal experts (and for a single one), about 0 for unrelated ones.
    With unit vectors u_e the sum over pairs is |sum_e u_e|^2 - E, so one expert's size of float32 is all
    the memory it takes.
    """
    experts = w13.shape[0]
    if experts == 1:
        return torch.ones((), dtype=torch.float64, device=w13.device)
    squares = [torch.zeros((), dtype=torch.float64, device=w13.device) for _ in range(experts)]
    for weight in (w13, w2):
        for e in range(experts):
            squares[e] += torch.linalg.vector_norm(weight[e], dtype=torch.float64).square()
    inverse = torch.stack(squares).clamp_min(1e-60).rsqrt()  # its root fits float32
    total = torch.zeros((), dtype=torch.float64, device=w13.device)
    for weight in (w13, w2):
        wide = torch.promote_types(weight.dtype, torch.float32)
        summed = torch.zeros(weight.shape[1:], dtype=wide, device=weight.device)
        for e in range(experts):
            summed.addcmul_(weight[e].to(wide), inverse[e].to(wide))
        total += torch.linalg.vector_norm(summed, dtype=torch.float64).square()
    return (total - experts) / (experts * (experts - 1))
