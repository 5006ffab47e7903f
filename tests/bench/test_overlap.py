"""The benchmark of overlap: its slow link, what it reports, and that sleeping experts hide a sleeping link."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.bench.overlap import DEFAULTS, SlowLink, main
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import build_layout
from moeforge.parallel import Mesh
from moeforge.parallel.dispatcher import AllToAllDispatcher

RunRanks = Callable[..., list[Any]]
SHAPE = ModelConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, ffn_size=16,
    moe=MoEConfig(num_experts=4, top_k=2, expert_size=16),
)  # fmt: skip


def two_ranks(whole_rows: int) -> tuple[Mesh, SlowLink]:
    mesh = Mesh.create(build_layout(SHAPE, tp=2), torch.device("cpu"))
    link = SlowLink(mesh.block, whole_rows)
    mesh.block = link
    return mesh, link


def _link(rank: int) -> tuple[list[float], Tensor]:
    mesh, link = two_ranks(8)
    link.seconds = 0.2
    mesh.world.barrier()
    start = time.perf_counter()
    first = link.start_all_to_all(torch.full((4, 2), float(rank)), [2, 2], [2, 2])
    second = link.start_all_to_all(torch.full((2, 2), float(rank)), [1, 1], [1, 1])
    times = [time.perf_counter() - start]
    received = first.wait()
    times.append(time.perf_counter() - start)
    second.wait()
    times.append(time.perf_counter() - start)
    return times, received


def test_a_link_carries_one_exchange_after_another(run_ranks: RunRanks) -> None:
    for (launched, first, second), received in run_ranks(2, _link):
        assert launched < 0.1 <= first < 0.15 <= second
        assert received[:, 0].tolist() == [0, 0, 1, 1]


class Sleep(torch.autograd.Function):
    """Identity whose work is sleeping: `seconds` a row in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds * len(x))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds * len(grads[0]))
        return grads[0], None


def _step_seconds(rank: int, work: float, delay: float) -> tuple[float, float]:
    """Of one piece and of four chunks; experts that work `work` seconds in each direction, an even routing."""
    mesh, link = two_ranks(80)
    link.seconds = delay
    x, weights = torch.randn(40, 8, requires_grad=True), torch.rand(40, 2, requires_grad=True)
    chosen = torch.tensor([[0, 2], [3, 1]] * 20)

    def seconds(chunks: int) -> float:
        mesh.world.barrier()
        start = time.perf_counter()
        dispatcher = AllToAllDispatcher(mesh, chunks)
        dispatcher.route(0, x, weights, chosen, None, 4, lambda rows, _: Sleep.apply(rows, work / 80)).sum().backward()
        mesh.world.barrier()
        return time.perf_counter() - start

    return seconds(1), seconds(4)


@pytest.mark.slow
def test_chunks_hide_the_link_behind_the_experts(run_ranks: RunRanks) -> None:
    work, delay = 0.8, 0.3
    for whole, cut in run_ranks(2, _step_seconds, work, delay):
        assert whole >= 2 * work + 4 * delay
        # All but the first exchange there and the last one back, of four, can be hidden: 3/4 of the delay.
        assert whole - cut >= 0.7 * 4 * delay


def _bench(rank: int) -> dict[str, Any]:
    return main(DEFAULTS | {"tokens": 16, "experts": 3, "chunks": [2, 3], "delays": [0.5], "pairs": 2})


def test_report(run_ranks: RunRanks) -> None:
    for result in run_ranks(2, _bench):
        assert result["processes"] == 2 and result["step_seconds_without_delay"].keys() == {1, 2, 3}
        (delayed,) = result["delayed"]
        assert delayed["delay_seconds_a_step"] == 4 * delayed["exchange_seconds"] > 0
        assert delayed["hideable_seconds"] <= delayed["delay_seconds_a_step"]
        assert delayed["exposed_seconds"].keys() == {1, 2, 3} and delayed["share_hidden"].keys() == {2, 3}
        assert len(delayed["share_hidden_of_each_pair"][2]) == 2
