"""Pipeline parallelism on torch.distributed.pipelining, with stages that are any slices of the unit list.

Only hidden states travel: every rank has its pipeline's micro-batches (tokens are small) and finds the one it needs by
number. The stage with the head computes the loss inside its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from moeforge.layout import require_schedule
from moeforge.model import Transformer
from moeforge.parallel.executor import Accumulation, Executor, MicroBatch
from moeforge.parallel.group import Group
from moeforge.parallel.mesh import Mesh

_SCHEDULES: dict[str, Any] = {
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def make_executor(
    chunks: Sequence[Transformer], mesh: Mesh, dtype: torch.dtype, collect: Callable[[], None]
) -> Executor:
    """The executor of this layout. `collect` is called after every backward that may have left gradients in
    `weight.grad` (see `train.Optimizer.collect`); `dtype` is that of hidden states."""
    if mesh.pp.size == 1:
        return Accumulation(chunks, mesh.device)
    return Pipeline(chunks, mesh, dtype, collect)


def share_tied(chunks: Sequence[Transformer]) -> None:
    """Make two chunks of one rank use one tensor for a tied embedding."""
    holders = [chunk for chunk in chunks if chunk.embed is not None]
    for chunk in holders[1:]:
        assert chunk.embed is not None and holders[0].embed is not None
        chunk.embed.weight = holders[0].embed.weight


class _StageModule(nn.Module):
    """What torch's stage calls: one chunk of the model on `batch`, one of `batches`."""

    def __init__(self, chunk: Transformer, mesh: Mesh, stage: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.chunk, self.mesh, self.dtype = chunk, mesh, dtype
        self.is_first, self.is_last = stage == 0, stage == len(mesh.layout.stages) - 1
        self.batches: Sequence[MicroBatch] = ()
        self.batch: MicroBatch | None = None
        self.losses: list[Tensor] = []

    def forward(self, received: Tensor) -> Tensor:
        batch = self.batch
        assert batch is not None
        hidden: Tensor | None = None if self.is_first else received
        if self.is_first and self.chunk.names[:1] != ("embed",):
            hidden = self._nothing(batch)
        if not self.is_first and self.is_last and not self.chunk.names:
            return received[:1, 0].clone()  # an empty last stage: the loss that the stage with the head put there
        out: Tensor = self.chunk(batch.tokens_T, batch.positions_T, batch.context, hidden)
        if self.chunk.head is None:
            return out
        loss = self.chunk.loss(out, batch.targets_T, batch.context) * batch.scale
        self.losses.append(loss.detach().double())
        if self.is_last:
            return torch.stack([loss])
        # Empty stages follow: the loss travels as a hidden state, so that backward finds its way.
        return F.pad(loss.to(self.dtype).reshape(1, 1), (0, out.shape[1] - 1, 0, out.shape[0] - 1))

    def _nothing(self, batch: MicroBatch) -> Tensor:
        """What an empty first stage hands on; with a gradient, or torch's stages send none back."""
        shape = hidden_shape(self.chunk, self.mesh, len(batch.tokens_T))
        zeros = torch.zeros(shape, dtype=self.dtype, device=self.mesh.device)
        return zeros.requires_grad_(torch.is_grad_enabled())


class _Stage(PipelineStage):
    """torch's stage, told by number which micro-batch it runs, and with a full backward where a split one is wrong.

    torch's split backward walks the graph once for the inputs and then weight by weight. Linear maps and experts
    compute in each walk only what it asks for. But every walk would recompute activations; and where a weight is used
    twice on one path, as a tied embedding and head in one chunk, torch up to 2.13 walks a part again that is gone, or
    counts it double (pytorch issue 180952).
    """

    submod: _StageModule

    def __init__(self, *arguments: Any, tokens: int, pp: Group, collect: Callable[[], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tokens, self._pp, self._collect = tokens, pp, collect
        chunk = self.submod.chunk
        tied = chunk.names[:1] == ("embed",) and chunk.head is not None and chunk.head.weight is None
        self._whole = bool(chunk.recompute) or tied
        self._complete: set[int] = set()

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, sends: Any) -> Any:
        for send in sends:
            size = send.tensor.numel() * send.tensor.element_size()
            self._pp.traffic.count("pp", "send", self._pp.rank, [self._pp.ranks[send.group_peer]], [size])
        return sends

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: Any, **options: Any) -> Any:
        batch = self.submod.batch = self.submod.batches[fwd_chunk_id]
        tokens = len(batch.tokens_T)
        if tokens != self._tokens:  # of other sizes than its peers expect: gloo would abort them
            raise ValueError(f"micro-batch {fwd_chunk_id} has {tokens} tokens, the first one {self._tokens}")
        with self._doing("forward"):
            return super().forward_one_chunk(fwd_chunk_id, *rest, **options)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not full_backward and self._whole:
            full_backward = True
            self._complete.add(bwd_chunk_id)
        with self._doing("backward"):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            if full_backward:
                self._collect()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if bwd_chunk_id in self._complete:
            self._complete.remove(bwd_chunk_id)
            return
        with self._doing("backward"):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            self._collect()

    def _doing(self, work: str) -> AbstractContextManager[None]:
        """For the watchdog: a rank that computes makes progress, and is not one of those that wait over pp."""
        return self._pp.watchdog.doing(f"{work} of stage {self.stage_index}")


class Pipeline:
    """The micro-batches of one pipeline under the layout's schedule."""

    def __init__(
        self, chunks: Sequence[Transformer], mesh: Mesh, dtype: torch.dtype, collect: Callable[[], None]
    ) -> None:
        self.mesh, self.dtype, self.collect = mesh, dtype, collect
        self.modules = [
            _StageModule(chunk, mesh, stage, dtype) for stage, chunk in zip(mesh.stages, chunks, strict=True)
        ]
        self._schedules: dict[tuple[int, int], Any] = {}

    def train(self, batches: Sequence[MicroBatch]) -> Tensor:
        schedule = self._schedule(len(batches), len(batches[0].tokens_T))
        for module in self.modules:
            module.batches = batches
        # torch's schedules cut their input and target into micro-batches: ours only count them.
        count = torch.zeros(len(batches), 1, device=self.mesh.device)
        inputs = (count,) if any(module.is_first for module in self.modules) else ()
        target = count if any(module.is_last for module in self.modules) else None
        with self.mesh.watchdog.doing("pipeline step over pp"):
            schedule.step(*inputs, target=target, return_outputs=False)
        return self._take_losses()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        layout, pp = self.mesh.layout, self.mesh.pp
        local = torch.empty(0)
        for batch in batches:
            for stage, module in zip(self.mesh.stages, self.modules, strict=True):
                module.batch = batch
                shape = hidden_shape(module.chunk, self.mesh, len(batch.tokens_T))
                hidden = torch.empty(shape, dtype=self.dtype, device=self.mesh.device)
                source = layout.pp_rank_of(stage - 1) if stage else None
                if source is not None:
                    hidden = local if source == pp.index else pp.receive(hidden, source)
                local = module(hidden)
                if not module.is_last and (target := layout.pp_rank_of(stage + 1)) != pp.index:
                    pp.send(local, target)
        return self._take_losses()

    def _take_losses(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for module in self.modules:
            for loss in module.losses:
                total += loss
            module.losses, module.batches, module.batch = [], (), None
        return total

    def _schedule(self, micro_batches: int, tokens: int) -> Any:
        """Made once a shape: torch's stages keep receive buffers of a fixed size."""
        if (micro_batches, tokens) in self._schedules:
            return self._schedules[micro_batches, tokens]
        layout = self.mesh.layout
        require_schedule(layout.schedule, len(layout.stages), layout.pp, micro_batches)
        stages = [
            self._stage(stage, module, tokens) for stage, module in zip(self.mesh.stages, self.modules, strict=True)
        ]
        made: Any
        if layout.schedule == "1f1b":
            made = Schedule1F1B(stages[0], micro_batches, loss_fn=_loss, scale_grads=False)
        else:
            made = _SCHEDULES[layout.schedule](stages, micro_batches, loss_fn=_loss, scale_grads=False)
        self._schedules[micro_batches, tokens] = made
        return made

    def _stage(self, stage: int, module: _StageModule, tokens: int) -> _Stage:
        shape = hidden_shape(module.chunk, self.mesh, tokens)
        hidden = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
        first = torch.empty(1, 1, device="meta")
        loss_type = torch.float64 if self.dtype == torch.float64 else torch.float32
        head_here = module.chunk.head is not None
        loss = torch.empty(1, dtype=loss_type if head_here else self.dtype, device="meta", requires_grad=True)
        return _Stage(
            module,
            stage,
            len(self.mesh.layout.stages),
            self.mesh.device,
            input_args=first if module.is_first else hidden,
            output_args=loss if module.is_last else hidden,
            group=self.mesh.pp.process_group,
            tokens=tokens,
            pp=self.mesh.pp,
            collect=self.collect,
        )


def hidden_shape(chunk: Transformer, mesh: Mesh, tokens: int) -> tuple[int, int]:
    """[t, D]: a rank's share of a micro-batch."""
    return -(-tokens // mesh.tp.size), chunk.config.hidden_size


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return output.sum()
