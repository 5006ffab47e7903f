"""Seam 1 for many ranks: tokens travel to their experts inside a block, and back.

Legend: t own tokens, K top-k, S rows sent, R rows received, E experts, e local experts, b ranks of the block, c chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeforge.kernels import combine, expert_permutation, gather, row_alignment
from moeforge.kernels.permute import Permutation
from moeforge.model.dispatcher import Dispatcher, ExpertFunction, LocalDispatcher
from moeforge.parallel.autograd import GatherRows, ScatterSum
from moeforge.parallel.exchange import Exchange
from moeforge.parallel.mesh import Mesh


def make_dispatcher(mesh: Mesh, top_k: int, kind: str = "auto", overlap_chunks: int = 1) -> Dispatcher:
    """The dispatcher of this mesh's expert mode.

    "alltoall" sends each token to the ranks that hold its experts, about K etp (b - 1) / b rows a token; "allgather"
    gives every rank of the block all tokens, b - 1 rows a token in fewer and simpler messages. "auto" takes the latter
    where it sends no more, K etp >= b, unless `overlap_chunks` > 1 cuts the tokens of an all-to-all into chunks, one
    travelling behind the computation of another.
    """
    if mesh.block.size == 1:
        return LocalDispatcher()
    small = top_k * mesh.layout.etp >= mesh.block.size and overlap_chunks == 1
    if kind == "allgather" or (kind == "auto" and small):
        return AllGatherDispatcher(mesh)
    return AllToAllDispatcher(mesh, overlap_chunks)


class _Chunk(NamedTuple):
    """Some of a rank's tokens, sorted by expert, with the exchange there and the one back.

    `sent_S`: rows of the sorted buffer in the order in which they are sent, None for their own order. `local_R`: the
    local expert of each received row.
    """

    weights_tK: Tensor
    permutation: Permutation
    sent_S: Tensor | None
    rows: int
    local_R: Tensor
    there: Exchange
    back: Exchange


class AllToAllDispatcher:
    """Every assignment's row goes to the rank(s) with its expert, comes back, and is weighted and added up here.

    Where experts are split by columns (etp > 1) a row goes to all ranks that share the expert, and their partial
    results are added up. Splits are uneven; ranks may hold, send or receive nothing.
    """

    def __init__(self, mesh: Mesh, overlap_chunks: int = 1) -> None:
        self.block, self.etp, self.chunks = mesh.block, mesh.layout.etp, overlap_chunks
        self.shards = mesh.layout.expert_ranks

    def route(
        self,
        layer: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        kept_TK: Tensor | None,
        num_experts: int,
        experts: ExpertFunction,
    ) -> Tensor:
        # As many chunks on every rank, however few the tokens: empty ones take part.
        x, weights, chosen = (each.tensor_split(self.chunks) for each in (x_TD, weights_TK, experts_TK))
        kept: Sequence[Tensor | None] = [None] * len(x) if kept_TK is None else kept_TK.tensor_split(self.chunks)
        held = [shard.experts[layer] for shard in self.shards]
        counts_bcE = self._exchange_counts(chosen, kept, num_experts)
        on_host = counts_bcE.cpu()  # the only wait for the device
        chunks: list[_Chunk] = []
        for i in range(len(x)):
            permutation = expert_permutation(chosen[i], num_experts, kept[i], alignment=1)
            chunks.append(self._plan(counts_bcE[:, i], on_host[:, i], held, weights[i], permutation))

        own_begin, own_end = held[self.block.index]
        under_way, returning = [_send(chunks[0], x[0])], []
        for i, chunk in enumerate(chunks):
            if i + 1 < len(chunks):
                under_way.append(_send(chunks[i + 1], x[i + 1]))
            received = chunk.there.wait(under_way[i])
            done = _run_experts(received, chunk.local_R, own_end - own_begin, experts)
            returning.append(chunk.back.launch(done))
        outputs = [self._combine(chunk, back) for chunk, back in zip(chunks, returning, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _exchange_counts(self, chosen: Sequence[Tensor], kept: Sequence[Tensor | None], num_experts: int) -> Tensor:
        """Rows that every rank sends to every expert, chunk by chunk: [b, c, E]."""
        counts = []
        for experts_tK, kept_tK in zip(chosen, kept, strict=True):
            flat = experts_tK.reshape(-1)
            ones = torch.ones_like(flat) if kept_tK is None else kept_tK.reshape(-1).to(flat.dtype)
            counts.append(flat.new_zeros(num_experts).scatter_add_(0, flat, ones))
        return self.block.all_gather(torch.stack(counts)[None])

    def _plan(
        self,
        counts_bE: Tensor,
        on_host_bE: Tensor,
        held: list[tuple[int, int]],
        weights_tK: Tensor,
        permutation: Permutation,
    ) -> _Chunk:
        starts = [0, *on_host_bE[self.block.index].cumsum(0).tolist()]
        send = [starts[end] - starts[begin] for begin, end in held]
        begin, end = held[self.block.index]
        receive = on_host_bE[:, begin:end].sum(1).tolist()
        device = counts_bE.device
        local_e = torch.arange(end - begin, device=device).repeat(len(held))
        local_R = local_e.repeat_interleave(counts_bE[:, begin:end].reshape(-1), output_size=sum(receive))
        sent_S = None
        if self.etp > 1:
            sent_S = torch.cat([torch.arange(starts[begin], starts[end], device=device) for begin, end in held])
        there, back = Exchange(self.block, send, receive), Exchange(self.block, receive, send)
        return _Chunk(weights_tK, permutation, sent_S, starts[-1], local_R, there, back)

    def _combine(self, chunk: _Chunk, returning: Tensor) -> Tensor:
        y_SD = chunk.back.wait(returning)
        if self.etp > 1:
            parts = y_SD.split(chunk.back.receive)
            y_SD = torch.cat([_total(parts[i : i + self.etp]) for i in range(0, len(parts), self.etp)])
        # Rows that no assignment fills: the last one is what dropped assignments share.
        missing = len(chunk.permutation.source_R) - chunk.rows
        if missing:
            y_SD = torch.cat([y_SD, y_SD.new_zeros(missing, y_SD.shape[1])])
        return combine(y_SD, chunk.weights_tK, chunk.permutation)


def _send(chunk: _Chunk, x_tD: Tensor) -> Tensor:
    sorted_SD = gather(x_tD, chunk.permutation)[: chunk.rows]
    return chunk.there.launch(sorted_SD if chunk.sent_S is None else sorted_SD.index_select(0, chunk.sent_S))


def _total(parts: tuple[Tensor, ...]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def _run_experts(x_RD: Tensor, local_R: Tensor, count: int, experts: ExpertFunction) -> Tensor:
    """Expert outputs of received rows, in their order."""
    if count == 0:
        return x_RD
    permutation = expert_permutation(local_R[:, None], count, alignment=row_alignment(x_RD.dtype))
    y_RD = experts(gather(x_RD, permutation), permutation.offsets_E)
    return y_RD.index_select(0, permutation.row_TK[:, 0])


class AllGatherDispatcher:
    """Every rank of the block gets all tokens, computes its experts' part of all of them, and the parts are summed."""

    def __init__(self, mesh: Mesh) -> None:
        self.block, self.held = mesh.block, mesh.layout.expert_ranks[mesh.at.expert_rank].experts

    def route(
        self,
        layer: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        kept_TK: Tensor | None,
        num_experts: int,
        experts: ExpertFunction,
    ) -> Tensor:
        begin, end = self.held[layer]
        # Here T are the tokens of the whole block.
        x_TD, weights_TK = GatherRows.apply(x_TD, self.block), GatherRows.apply(weights_TK, self.block)
        # A dropped assignment is no expert's.
        experts_TK = experts_TK if kept_TK is None else experts_TK.where(kept_TK, num_experts)
        experts_TK = self.block.all_gather(experts_TK)
        if begin == end:  # nothing to add, and still part of the graph, so that backward meets the others
            part_TD = torch.zeros_like(x_TD) + (x_TD[:0].sum() + weights_TK[:0].sum())
        else:
            mine_TK = (experts_TK >= begin) & (experts_TK < end)
            local_TK = (experts_TK - begin).where(mine_TK, 0)
            alignment = row_alignment(x_TD.dtype)
            permutation = _cut(expert_permutation(local_TK, end - begin, mine_TK, alignment), mine_TK, alignment)
            y_RD = experts(gather(x_TD, permutation), permutation.offsets_E)
            part_TD = combine(y_RD, weights_TK.where(mine_TK, 0.0), permutation)
        out: Tensor = ScatterSum.apply(part_TD, self.block)
        return out


def _cut(permutation: Permutation, kept_TK: Tensor, alignment: int) -> Permutation:
    """`permutation` without needless padding.

    On GPUs its buffer has room for every assignment of every rank, lest the host wait, and the last expert would
    compute all of it; few of them are this rank's, so that waiting is cheaper.
    """
    used = int(permutation.row_TK.where(kept_TK, -1).max()) + 1
    rows = -(-used // alignment) * alignment + alignment  # the last ones are what dropped assignments share
    return Permutation(
        permutation.source_R[:rows], permutation.row_TK.clamp_max(rows - 1), permutation.offsets_E.clamp_max(rows)
    )
