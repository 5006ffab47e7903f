"""The order in which chunks travel and are computed, event by event: what makes the overlap an overlap."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import build_layout
from moeforge.model.recompute import recomputed
from moeforge.parallel import Mesh, dispatcher
from moeforge.parallel.exchange import Exchange

SHAPE = ModelConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, ffn_size=16,
    moe=MoEConfig(num_experts=3, top_k=2, expert_size=16),
)  # fmt: skip
FORWARD = (
    "start there 0, start there 1, wait there 0, compute 0, start back 0, "
    "start there 2, wait there 1, compute 1, start back 1, wait there 2, compute 2, start back 2, "
    "wait back 0, wait back 1, wait back 2"
)
# The gradients of all results set out at once; a chunk's input gradients travel behind the work of the chunk after it.
BACKWARD = (
    "start back 2, start back 1, start back 0, "
    "wait back 2, compute 2, start there 2, wait back 1, compute 1, start there 1, wait there 2, "
    "wait back 0, compute 0, start there 0, wait there 1, wait there 0"
)


class Noted(torch.autograd.Function):
    """Identity that says when it runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str], name: str) -> Tensor:
        ctx.events, ctx.name = events, name
        events.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(ctx.name)
        return grads[0], None, None


def step(rank: int, again: bool) -> tuple[str, str]:
    """Events of the forward and of the backward pass of 3 chunks; `again`: activations are recomputed."""
    mesh = Mesh.create(build_layout(SHAPE, tp=2), torch.device("cpu"))
    events: list[str] = []
    made, computed = count(), count()

    class Named(Exchange):
        """The dispatcher makes those of a chunk, there and back, one after the other."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            chunk, way = divmod(next(made), 2)
            self.name = f"{'back' if way else 'there'} {chunk % 3}"

        def start(self, *arguments: Any) -> Tensor:
            events.append(f"start {self.name}")
            return super().start(*arguments)

        def finish(self) -> Tensor:
            events.append(f"wait {self.name}")
            return super().finish()

    dispatcher.Exchange = Named  # type: ignore[misc]
    torch.manual_seed(rank)
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(12, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.rand(12, 3).topk(2).indices

    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def experts(rows: Tensor, offsets: Tensor) -> Tensor:
                out: Tensor = Noted.apply(rows, events, f"compute {next(computed) % 3}")
                return out

            return dispatcher.AllToAllDispatcher(mesh, 3).route(0, x, weights, chosen, None, 3, experts)

    out = recomputed(Unit(), x) if again else Unit()(x)
    forward = ", ".join(events)
    events.clear()
    out.square().sum().backward()
    return forward, ", ".join(events)


def test_forward_and_backward(run_ranks: Any) -> None:
    assert run_ranks(2, step, False) == [(FORWARD, BACKWARD)] * 2


def test_recomputed_whole_before_its_backward(run_ranks: Any) -> None:
    assert run_ranks(2, step, True) == [(FORWARD, f"{FORWARD}, {BACKWARD}")] * 2
