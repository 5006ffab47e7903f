"""What chunks hide of a slow all-to-all: `torchrun --nproc-per-node 2 -m moeforge.bench.overlap [JOB.json]`.

One MoE layer, forward and backward, over a link that is made slower here. With and without delay, in one piece and in
chunks, steps take turns in the same processes, so the machine's moods hit all of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeforge.config.model import MoEConfig
from moeforge.config.presets import model_preset
from moeforge.layout import build_layout
from moeforge.model.dispatcher import Dispatcher
from moeforge.model.units import Experts
from moeforge.parallel import Group, Mesh, Pending, launch
from moeforge.parallel.dispatcher import make_dispatcher
from moeforge.train.optimizer import MODEL_DTYPE

DEFAULTS: dict[str, Any] = {
    "model": "smollm2-135m", "experts": 8, "top_k": 2, "tokens": 4096, "precision": "fp32", "chunks": [4, 6, 8],
    "delays": [0.5, 1.0], "pairs": 7,
}  # fmt: skip
"""`tokens` are each process's. `delays`: what the two exchanges of a forward pass take, as a share of its seconds."""


class SlowLink(Group):
    """A group whose exchanges pass a link in turn: one of `whole_rows` rows takes `seconds`, a part of it its share.

    The time goes with the rows, since a fixed time for each exchange, however small, cannot be hidden by cutting: the
    first chunk's experts would start after one such time, and the last one's results arrive one after they end.
    """

    def __init__(self, group: Group, whole_rows: int) -> None:
        super().__init__(group.name, group.ranks, group.rank, group.process_group, group.traffic, group.watchdog)
        self.seconds, self.whole_rows, self._free = 0.0, whole_rows, 0.0

    def start_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """As in `Group`; it cannot arrive before the link has carried it."""
        pending = super().start_all_to_all(x, send, receive)
        self._free = max(self._free, time.perf_counter()) + self.seconds * len(x) / self.whole_rows
        return _Late(pending, self._free)


class _Late(Pending):
    def __init__(self, pending: Pending, due: float) -> None:
        self.output, self._pending, self._due = pending.output, pending, due

    def wait(self) -> Tensor:
        """Sleeps until it is due: the processor is free for others, and for nothing of this process."""
        output = self._pending.wait()
        time.sleep(max(0.0, self._due - time.perf_counter()))
        return output


class Seconds(NamedTuple):
    """Of one step; `whole` until the last process is done."""

    forward: float
    backward: float
    whole: float


class Layer:
    """A layer's experts with fixed tokens and routing, alike in every step."""

    def __init__(self, mesh: Mesh, job: dict[str, Any], hidden: int, columns: int) -> None:
        self.mesh, self.num_experts = mesh, job["experts"]
        begin, end = mesh.layout.expert_ranks[mesh.at.expert_rank].experts[0]
        dtype = MODEL_DTYPE[job["precision"]]
        self.experts = Experts(hidden, end - begin, columns).to(dtype)
        torch.manual_seed(mesh.rank)
        for weight in self.experts.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        self.x_TD = torch.randn(job["tokens"], hidden).to(dtype).requires_grad_()
        self.weights_TK = torch.rand(job["tokens"], job["top_k"]).requires_grad_()
        self.experts_TK = torch.rand(job["tokens"], self.num_experts).topk(job["top_k"]).indices
        self.grad_TD = torch.randn(job["tokens"], hidden).to(dtype)

    def step(self, dispatcher: Dispatcher) -> Seconds:
        """Forward and backward on all processes."""
        for leaf in (self.x_TD, self.weights_TK, *self.experts.parameters()):
            leaf.grad = None
        self.mesh.world.barrier()
        start = time.perf_counter()
        out = dispatcher.route(0, self.x_TD, self.weights_TK, self.experts_TK, None, self.num_experts, self.experts)
        middle = time.perf_counter()
        out.backward(self.grad_TD)
        end = time.perf_counter()
        self.mesh.world.barrier()
        return Seconds(middle - start, end - middle, time.perf_counter() - start)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a job with the keys of DEFAULTS; the processes are a tensor-parallel group.

    Exposed time is that of a step over the slow link less that of the undivided step without delay, pair by pair: what
    cutting itself costs counts as exposed. `share_hidden` is how much less is exposed in chunks than in one piece, over
    what could be hidden: the delay, or the computation of its pass where that is shorter.
    """
    torch.set_num_threads(1)
    launch.initialise(torch.device("cpu"), 600)
    dense = model_preset(job["model"])
    shape = replace(dense, num_layers=1, moe=MoEConfig(job["experts"], job["top_k"], dense.ffn_size))
    mesh = Mesh.create(build_layout(shape, tp=launch.world_size()), torch.device("cpu"))
    link = SlowLink(mesh.block, job["tokens"] * job["top_k"])
    mesh.block = link
    layer = Layer(mesh, job, shape.hidden_size, dense.ffn_size)
    dispatchers = {chunks: make_dispatcher(mesh, job["top_k"], "alltoall", chunks) for chunks in (1, *job["chunks"])}

    for dispatcher in dispatchers.values():
        layer.step(dispatcher)
    forward = statistics.median(layer.step(dispatchers[1]).forward for _ in range(3))
    slowest = max(mesh.world.all_gather_object(forward))
    delays = [share * slowest / 2 for share in job["delays"]]

    steps: dict[tuple[int, float], list[Seconds]] = {(n, each): [] for each in (0.0, *delays) for n in dispatchers}
    for _ in range(job["pairs"]):
        for (chunks, link.seconds), measured in steps.items():
            measured.append(layer.step(dispatchers[chunks]))
    plain = steps[1, 0.0]
    passes = [statistics.median(each.forward for each in plain), statistics.median(each.backward for each in plain)]
    return {
        **job,
        "processes": launch.world_size(),
        "forward_seconds": passes[0],
        "backward_seconds": passes[1],
        "step_seconds_without_delay": {n: _median(steps[n, 0.0]) for n in dispatchers},
        "delayed": [_compare(steps, each, passes, job["chunks"]) for each in delays],
    }


def _compare(
    steps: dict[tuple[int, float], list[Seconds]], delay: float, passes: list[float], cuts: list[int]
) -> dict[str, Any]:
    hideable = sum(min(2 * delay, each) for each in passes)
    plain = steps[1, 0.0]
    exposed = {n: _differences(steps[n, delay], plain) for n in (1, *cuts)}
    less = {n: [(off - on) / hideable for off, on in zip(exposed[1], exposed[n], strict=True)] for n in cuts}
    return {
        "exchange_seconds": delay,
        "delay_seconds_a_step": 4 * delay,
        "hideable_seconds": hideable,
        "exposed_seconds": {n: statistics.median(each) for n, each in exposed.items()},
        "share_hidden": {n: statistics.median(each) for n, each in less.items()},
        "share_hidden_of_each_pair": less,
    }


def _differences(slow: list[Seconds], plain: list[Seconds]) -> list[float]:
    return [a.whole - b.whole for a, b in zip(slow, plain, strict=True)]


def _median(steps: list[Seconds]) -> float:
    return statistics.median(each.whole for each in steps)


if __name__ == "__main__":
    result = main(DEFAULTS | (json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else {}))
    if launch.world_rank() == 0:
        print(json.dumps(result))
    launch.shut_down()
