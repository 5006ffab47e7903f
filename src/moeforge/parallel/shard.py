"""Seam 3 for many ranks: tensor and sequence parallelism by the explicit ranges of a Layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import Weight, linear, linear_cross_entropy, rms_norm
from moeforge.kernels.precision import widen
from moeforge.parallel.autograd import GatherRows, GatherSame, ScatterSum, SumOver
from moeforge.parallel.cross_entropy import vocab_parallel_cross_entropy
from moeforge.parallel.mesh import Mesh


class TensorParallelShard:
    """`moeforge.model.Shard` of one rank for micro-batches of `tokens` tokens.

    Shares have ceil(tokens / tp) rows; what lacks at the end is filled with zero rows, which `enter` strips. Sums over
    ranks are made in the type of the activations.
    """

    def __init__(self, mesh: Mesh, tokens: int) -> None:
        self.tp, self.dp, self.tokens = mesh.tp, mesh.dp, tokens
        self.rows_V = mesh.layout.ranks[mesh.at.tp].vocab_rows
        self.all_rows_V = [shard.vocab_rows for shard in mesh.layout.ranks]
        self.share = -(-tokens // self.tp.size)
        self.missing = self.share * self.tp.size - tokens

    def enter(self, x_tD: Tensor) -> Tensor:
        if self.tp.size == 1:
            return x_tD
        x_TD = GatherRows.apply(x_tD, self.tp)
        return x_TD[: self.tokens] if self.missing else x_TD

    def leave(self, x_TD: Tensor) -> Tensor:
        if self.tp.size == 1:
            return x_TD
        return ScatterSum.apply(F.pad(x_TD, (0, 0, 0, self.missing)) if self.missing else x_TD, self.tp)

    def norm(self, x_TC: Tensor, weight_C: Tensor, eps: float, width: int) -> Tensor:
        if self.tp.size == 1:
            return rms_norm(x_TC, weight_C, eps)
        wide = widen(x_TC)
        squares = SumOver.apply(wide.square().sum(-1, keepdim=True), self.tp)
        return (wide * torch.rsqrt(squares / width + eps)).to(x_TC.dtype) * weight_C

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens_T, weight_VD)
        begin, end = self.rows_V
        if begin == end:  # nothing to look up, and still something that gradients find
            return self.leave(weight_VD.new_zeros(len(tokens_T), weight_VD.shape[1]) + weight_VD.sum())
        mine = (tokens_T >= begin) & (tokens_T < end)
        return self.leave(F.embedding((tokens_T - begin).where(mine, 0), weight_VD) * mine[:, None])

    def logits(self, x_tD: Tensor, weight_VD: Weight) -> Tensor:
        """Full logits [T, V], without a gradient where there are many ranks: training uses `cross_entropy`."""
        if self.tp.size == 1:
            return linear(x_tD, weight_VD)
        with torch.no_grad():
            widest = max(end - begin for begin, end in self.all_rows_V)
            own = linear(self.enter(x_tD), weight_VD)
            parts = self.tp.all_gather(F.pad(own, (0, widest - own.shape[1]))[None])
            return torch.cat(
                [part[:, : end - begin] for part, (begin, end) in zip(parts, self.all_rows_V, strict=True)], 1
            )

    def cross_entropy(self, x_tD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        if self.tp.size == 1:
            return linear_cross_entropy(x_tD, weight_VD, targets_T)
        return vocab_parallel_cross_entropy(self.enter(x_tD), weight_VD, targets_T, self.rows_V[0], self.tp)

    def gather_tokens(self, *columns: Tensor) -> tuple[Tensor, ...]:
        if self.tp.size == 1:
            return columns
        # One collective for all. Expert numbers are small enough to be exact in float32.
        packed: Any = torch.cat([column.to(columns[0].dtype) for column in columns], 1)
        whole = GatherSame.apply(packed, self.tp)[: self.tokens].split([c.shape[1] for c in columns], 1)
        return tuple(part.to(column.dtype) for part, column in zip(whole, columns, strict=True))

    def own_kept(self, kept_TK: Tensor | None, experts_tK: Tensor) -> Tensor | None:
        if self.tp.size == 1 or (kept_TK is None and not self.missing):
            return kept_TK
        if kept_TK is None:
            kept_TK = torch.ones(self.tokens, experts_tK.shape[1], dtype=torch.bool, device=experts_tK.device)
        filled = F.pad(kept_TK, (0, 0, 0, self.missing))
        begin = self.tp.index * self.share
        return filled[begin : begin + self.share]

    def reduce_statistics(self, x: Tensor) -> Tensor:
        return x if self.dp.size == 1 else self.dp.all_reduce(x.clone())
