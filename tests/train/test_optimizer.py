from __future__ import annotations

import pytest
import torch
from torch import nn

from moeforge.train import Optimizer


class Toy(nn.Module):
    """Parameters with the names that decide their groups."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(4, 4, bias=True, dtype=dtype)
        self.norm = nn.Linear(4, 4, bias=False, dtype=dtype)
        self.experts = nn.ParameterDict({"w13": nn.Parameter(torch.randn(4, 4, dtype=dtype))})
        self.layer = nn.Module()
        self.layer.experts = nn.ParameterDict({"w2": nn.Parameter(torch.randn(4, 4, dtype=dtype))})

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.dense(x)) @ self.experts["w13"] @ self.layer.experts["w2"]
        return y.float().square().mean()


def grads_of(model: Toy, x: torch.Tensor) -> None:
    model.loss(x).backward()


def test_masters_see_what_bf16_would_lose() -> None:
    """Updates far below bf16's resolution add up in the masters and finally move the weights."""
    moved = {}
    for masters in (True, False):
        model = Toy(torch.bfloat16)
        before = model.dense.weight.detach().clone()
        optimizer = Optimizer(model, masters=masters, weight_decay=0.0)
        for _ in range(60):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            if masters:
                for weight, mover in zip(optimizer.weights, optimizer._movers, strict=True):
                    mover(weight)
            optimizer.step(1e-4)
        moved[masters] = (before - model.dense.weight).float().mean().item()
    assert moved[True] == pytest.approx(60e-4, rel=0.15)
    assert abs(moved[False]) < moved[True] / 2


def test_accumulated_gradients_sum_in_float32() -> None:
    model, x = Toy(torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    optimizer = Optimizer(model, masters=True)
    single = []
    for _ in range(2):
        grads_of(model, x)
        single.append(optimizer.masters[0].grad.clone())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(single[1], 2 * single[0])
    optimizer.step(1e-3)
    grads_of(model, x)  # a new step starts a new sum
    assert optimizer.masters[0].grad.norm() < single[1].norm() * 1.2


def test_a_weight_without_gradient_keeps_its_master() -> None:
    model, x = Toy(torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    optimizer = Optimizer(model, masters=True, kind="sgd", weight_decay=0.0)
    grads_of(model, x)
    optimizer.step(0.1)
    before = [m.clone() for m in optimizer.masters]
    optimizer.step(0.1)  # no backward since: stale gradients must not act again
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.masters, strict=True))


def test_clipping_scales_the_update_and_reports_the_norm_before() -> None:
    x = torch.randn(3, 4) * 100
    free, clipped = Toy(), Toy()
    start = free.dense.weight.detach().clone()
    optimizers = [
        Optimizer(m, masters=False, kind="sgd", weight_decay=0.0, clip_norm=c) for m, c in ((free, 0.0), (clipped, 0.5))
    ]
    norms = []
    for model, optimizer in zip((free, clipped), optimizers, strict=True):
        grads_of(model, x)
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        norms.append(optimizer.step(1e-3))
        assert norms[-1].item() == pytest.approx(expected.item(), rel=1e-5)
    assert norms[0] == norms[1] and norms[0] > 0.5
    ratio = (start - clipped.dense.weight) / (start - free.dense.weight)
    assert ratio.mean().item() == pytest.approx(0.5 / norms[0].item(), rel=1e-2)


def test_groups_decay_matrices_only_and_scale_experts() -> None:
    model = Toy()
    optimizer = Optimizer(model, masters=False, weight_decay=0.1, expert_lr_scale=0.5)
    by_parameter = {id(p): g for g in optimizer.torch.param_groups for p in g["params"]}
    assert by_parameter[id(model.dense.weight)]["weight_decay"] == 0.1
    assert by_parameter[id(model.dense.bias)]["weight_decay"] == 0.0
    assert by_parameter[id(model.norm.weight)]["weight_decay"] == 0.0
    assert by_parameter[id(model.layer.experts["w2"])]["scale"] == 0.5
    assert by_parameter[id(model.dense.weight)]["scale"] == 1.0


@pytest.mark.parametrize("masters", [True, False])
def test_state_restores_the_very_same_steps(masters: bool) -> None:
    dtype = torch.bfloat16 if masters else torch.float32
    x = torch.randn(3, 4, dtype=dtype)
    one, two = Toy(dtype), Toy(dtype)
    first = Optimizer(one, masters=masters)
    for _ in range(3):
        grads_of(one, x)
        first.step(1e-2)
    two.load_state_dict(one.state_dict())
    second = Optimizer(two, masters=masters)
    second.load({name: tensor.clone() for name, tensor in first.state()})
    for _ in range(3):
        for model, optimizer in ((one, first), (two, second)):
            grads_of(model, x)
            optimizer.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
