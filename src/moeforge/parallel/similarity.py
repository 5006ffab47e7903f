"""Expert similarity of a layer whose experts are spread over a block."""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.model.units import Experts
from moeforge.parallel.mesh import Mesh
from moeforge.upcycle.similarity import expert_similarity


@torch.no_grad()
def distributed_similarity(mesh: Mesh, layer: int, experts: Experts) -> Tensor:
    """Mean over pairs of experts of the cosine of their flattened [w1, w3, w2]; float64 scalar, equal on all ranks.

    As `upcycle.expert_similarity`, from |sum_e u_e|^2 = E + E (E - 1) mean cosine with unit vectors u_e. A rank knows
    its columns of its experts: it scales them by norms that are summed over the block, and adds up its part of sum_e
    u_e in place of the whole; ranks with the same columns add theirs.
    """
    if mesh.block.size == 1:
        return expert_similarity(experts.w13, experts.w2)
    shard = mesh.layout.expert_ranks[mesh.at.expert_rank]
    (begin, end), (first, last) = shard.experts[layer], shard.columns[layer]
    experts_count = max(each.experts[layer][1] for each in mesh.layout.expert_ranks)
    width = max(each.columns[layer][1] for each in mesh.layout.expert_ranks)
    w13, w2 = experts.w13, experts.w2
    hidden = w2.shape[1]

    squares = torch.zeros(experts_count, dtype=torch.float64, device=w13.device)
    for e in range(end - begin):
        squares[begin + e] = w13[e].double().square().sum() + w2[e].double().square().sum()
    norms = mesh.block.all_reduce(squares).clamp_min(1e-60).sqrt()

    # One matrix at a time keeps the sum as small as a third of an expert.
    total = torch.zeros((), dtype=torch.float64, device=w13.device)
    for matrix in range(3):
        part = torch.zeros(width, hidden, dtype=torch.float64, device=w13.device)
        for e in range(end - begin):
            own = w2[e].t() if matrix == 2 else w13[e].chunk(2)[matrix]
            part[first:last] += own.double() / norms[begin + e]
        total += mesh.block.all_reduce(part).square().sum()
    if experts_count == 1:
        return torch.ones_like(total)
    return (total - experts_count) / (experts_count * (experts_count - 1))
