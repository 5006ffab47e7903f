"""An all-to-all in chunks travels behind the experts' work, forward and backward, and changes no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import build_layout
from moeforge.model.units import Experts
from moeforge.parallel import Group, Mesh, Pending
from moeforge.parallel.dispatcher import make_dispatcher

SHAPE = ModelConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, ffn_size=16,
    moe=MoEConfig(num_experts=5, top_k=2, expert_size=16),
)  # fmt: skip


def step(rank: int, chunks: int) -> tuple[list[str], list[Tensor]]:
    """Events of the forward pass; output and gradients."""
    mesh = Mesh.create(build_layout(SHAPE, tp=2), torch.device("cpu"))
    events: list[str] = []
    start, wait = Group.start_all_to_all, Pending.wait

    def noted_start(self: Group, *arguments: Any) -> Pending:
        events.append("launch")
        return start(self, *arguments)

    def noted_wait(self: Pending) -> Tensor:
        events.append("wait")
        return wait(self)

    Group.start_all_to_all, Pending.wait = noted_start, noted_wait  # type: ignore[method-assign]
    torch.manual_seed(rank)
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(12, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.rand(12, 5).topk(2).indices
    torch.manual_seed(9 + rank)
    held = mesh.layout.expert_ranks[mesh.at.expert_rank].experts[0]
    experts = Experts(8, held[1] - held[0], 16).double()
    torch.nn.init.normal_(experts.w13)
    torch.nn.init.normal_(experts.w2)
    dispatcher = make_dispatcher(mesh, 2, "alltoall", chunks)

    def noted_experts(rows: Tensor, offsets: Tensor) -> Tensor:
        events.append("experts")
        return experts(rows, offsets)

    out = dispatcher.route(0, x, weights, chosen, None, 5, noted_experts)
    forward = list(events)
    out.square().sum().backward()
    grads = [x.grad, weights.grad, experts.w13.grad, experts.w2.grad]
    return forward, [out.detach(), *[grad for grad in grads if grad is not None]]


def test_chunks_travel_behind_the_experts(run_ranks: Any) -> None:
    whole, cut = run_ranks(2, step, 1), run_ranks(2, step, 3)
    for (alone, expected), (forward, found) in zip(whole, cut, strict=True):
        assert alone == ["launch", "wait", "experts", "launch", "wait"]
        # While the experts work on one chunk, the next is on its way, and the one before on its way back.
        assert forward[:6] == ["launch", "launch", "wait", "experts", "launch", "launch"]
        places = [i for i, event in enumerate(forward) if event == "experts"]
        under_way = [forward[:i].count("launch") - forward[:i].count("wait") for i in places]
        assert under_way == [1, 2, 2]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_backward_overlaps_too(run_ranks: Any) -> None:
    for chunks, overlapped in ((1, 0), (3, 2)):
        for under_way in run_ranks(2, backward_under_way, chunks):
            assert sum(count > 0 for count in under_way) >= overlapped, (chunks, under_way)
            assert chunks > 1 or under_way == [0]


def backward_under_way(rank: int, chunks: int) -> list[int]:
    """How many exchanges are under way when each chunk's experts go backward."""
    mesh = Mesh.create(build_layout(SHAPE, tp=2), torch.device("cpu"))
    counts, open_now = list[int](), [0]
    start, wait = Group.start_all_to_all, Pending.wait

    def noted_start(self: Group, *arguments: Any) -> Pending:
        open_now[0] += 1
        return start(self, *arguments)

    def noted_wait(self: Pending) -> Tensor:
        open_now[0] -= 1
        return wait(self)

    Group.start_all_to_all, Pending.wait = noted_start, noted_wait  # type: ignore[method-assign]
    torch.manual_seed(rank)
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)

    def experts(rows: Tensor, offsets: Tensor) -> Tensor:
        out = rows * 2
        if out.requires_grad:
            out.register_hook(lambda grad: counts.append(open_now[0]))
        return out

    chosen = torch.rand(12, 5).topk(2).indices
    weights = torch.ones(12, 2, dtype=torch.float64)
    make_dispatcher(mesh, 2, "alltoall", chunks).route(0, x, weights, chosen, None, 5, experts).sum().backward()
    return counts


@pytest.mark.parametrize(("kind", "chunks", "expected"), [("auto", 1, "AllGather"), ("auto", 2, "AllToAll")])
def test_auto(kind: str, chunks: int, expected: str, run_ranks: Any) -> None:
    def name(rank: int) -> str:
        mesh = Mesh.create(build_layout(SHAPE, tp=2), torch.device("cpu"))
        return type(make_dispatcher(mesh, 2, kind, chunks)).__name__

    assert run_ranks(2, name) == [f"{expected}Dispatcher"] * 2
