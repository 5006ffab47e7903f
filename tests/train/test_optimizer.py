"""The optimiser in one process; tests/parallel/test_zero.py has many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeforge.config.model import ModelConfig
from moeforge.layout import Layout
from moeforge.parallel import Mesh
from moeforge.parallel.parameters import ParameterPart
from moeforge.train.optimizer import Optimizer


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


def optimizer_of(model: nn.Module, masters: bool = False, **settings: Any) -> Optimizer:
    """Of all the model's parameters, in one process."""
    parameters = dict(model.named_parameters())
    parts = {
        name: ParameterPart(name, (*p.shape,), (0,) * p.ndim, (*p.shape,), (*p.shape,), "dp")
        for name, p in parameters.items()
    }
    mesh = Mesh.single(Layout.single(ModelConfig(4, 4, 1, 1, 1, 4, 4)), torch.device("cpu"))
    return Optimizer(parameters, parts, mesh, masters=masters, **settings)


def grads_of(model: Toy, x: torch.Tensor) -> None:
    model.loss(x).backward()


def test_masters_see_what_bf16_would_lose() -> None:
    """Updates far below bf16's resolution add up in the masters and finally move the weights."""
    moved = {}
    for masters in (True, False):
        model = Toy(torch.bfloat16)
        before = model.dense.weight.detach().clone()
        optimizer = optimizer_of(model, masters, weight_decay=0.0)
        for _ in range(60):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step(1e-4)
        moved[masters] = (before - model.dense.weight).float().mean().item()
    assert moved[True] == pytest.approx(60e-4, rel=0.15)
    assert abs(moved[False]) < moved[True] / 2


def weights_of(optimizer: Optimizer, key: str = "weight") -> dict[str, Tensor]:
    return {e.part.name: e.tensor.clone() for e in optimizer.entries() if e.key == f"{key}.{e.part.name}"}


def test_accumulated_gradients_sum_in_float32() -> None:
    """Hooks move them as autograd produces them; a step starts the next sum anew."""
    model = Toy(torch.bfloat16)
    small, steps = 2.0**-10, 8  # beside 1 it is lost in bf16, eight of them are not
    optimizer = optimizer_of(model, masters=True, kind="sgd", weight_decay=0.0)
    for _ in range(2):
        before = weights_of(optimizer)
        for factor in [1.0] + [small] * steps:
            (model.dense.bias.sum() * factor).backward()
            assert model.dense.bias.grad is None
        optimizer.step(1.0)
        moved = before["dense.bias"] - weights_of(optimizer)["dense.bias"]
        torch.testing.assert_close(moved, torch.full_like(moved, 1 + steps * small), rtol=1e-6, atol=0)


def test_gradients_assigned_past_the_hooks_are_collected() -> None:
    """Split-backward pipeline schedules do so; mixed with the hooks' they sum all the same."""
    model = Toy(torch.bfloat16)
    optimizer = optimizer_of(model, masters=True, kind="sgd", weight_decay=0.0)
    before = weights_of(optimizer)
    for how in ("assigned", "hook", "assigned", "left for the step"):
        if how == "hook":
            model.dense.bias.sum().backward()
        else:
            model.dense.bias.grad = torch.ones_like(model.dense.bias)
            if how == "assigned":
                optimizer.collect()
                assert model.dense.bias.grad is None
    optimizer.step(1.0)
    torch.testing.assert_close(before["dense.bias"] - weights_of(optimizer)["dense.bias"], torch.full((4,), 4.0))


@pytest.mark.parametrize("masters", [True, False])
def test_a_weight_without_gradient_stays(masters: bool) -> None:
    dtype = torch.bfloat16 if masters else torch.float32
    model, x = Toy(dtype), torch.randn(3, 4, dtype=dtype)
    optimizer = optimizer_of(model, masters, kind="sgd", weight_decay=0.0)
    grads_of(model, x)
    optimizer.step(0.1)
    before = weights_of(optimizer)
    norm = optimizer.step(0.1)  # no backward since: stale gradients must not act again
    assert norm == 0
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(optimizer).items())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_one_process_does_exactly_what_torch_does(kind: str) -> None:
    """To the last bit, clipping and groups included."""
    ours, theirs, x = Toy(), Toy(), torch.randn(3, 4)
    optimizer = optimizer_of(ours, kind=kind, clip_norm=0.3, expert_lr_scale=0.5)
    lr, decay = 1e-2, 0.1
    groups = [
        {
            "params": [p],
            "weight_decay": decay * (p.ndim > 1 and "norm" not in name),
            "lr": lr * (0.5 if "layer.e" in name else 1),
        }
        for name, p in theirs.named_parameters()
    ]
    other: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True) if kind == "adamw" else torch.optim.SGD(groups)
    )
    for _ in range(4):
        grads_of(ours, x)
        grads_of(theirs, x)
        norms = [p.grad.norm() for p in theirs.parameters() if p.grad is not None]
        wanted = torch.stack(norms).norm()
        norm = optimizer.step(lr)
        assert torch.equal(norm, wanted) and wanted > 0.3
        torch._foreach_mul_([p.grad for p in theirs.parameters()], 0.3 / wanted)
        other.step()
        other.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_clipping_scales_the_update_and_reports_the_norm_before() -> None:
    x = torch.randn(3, 4) * 100
    free, clipped = Toy(), Toy()
    start = free.dense.weight.detach().clone()
    optimizers = [optimizer_of(m, kind="sgd", weight_decay=0.0, clip_norm=c) for m, c in ((free, 0.0), (clipped, 0.5))]
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
    optimizer = optimizer_of(model, weight_decay=0.1, expert_lr_scale=0.5)
    group_of = {id(p): g for g in optimizer.torch.param_groups for p in g["params"]}
    groups = {name: group_of[id(own)] for name, own in optimizer.owned.items()}
    assert groups["dense.weight"]["weight_decay"] == 0.1
    assert groups["dense.bias"]["weight_decay"] == 0.0
    assert groups["norm.weight"]["weight_decay"] == 0.0
    assert groups["layer.experts.w2"]["scale"] == 0.5
    assert groups["dense.weight"]["scale"] == 1.0


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("masters", [True, False])
def test_entries_restore_the_very_same_steps(masters: bool, kind: Any) -> None:
    dtype = torch.bfloat16 if masters else torch.float32
    x = torch.randn(3, 4, dtype=dtype)
    one, two = Toy(dtype), Toy(dtype)
    first = optimizer_of(one, masters, kind=kind)
    for _ in range(3):
        grads_of(one, x)
        first.step(1e-2)
    with torch.no_grad():
        for parameter in two.parameters():  # the entries hold the weights too
            parameter.zero_()
    second = optimizer_of(two, masters, kind=kind)
    saved = {entry.key: entry.tensor.clone() for entry in first.entries()}
    wanted = {"weight", "exp_avg", "exp_avg_sq"} if kind == "adamw" else {"weight"}
    assert saved.keys() == {f"{key}.{name}" for key in wanted for name, _ in one.named_parameters()}
    for entry in second.entries():
        assert (entry.begin, entry.end, entry.saved) == (0, entry.part.numel, True)
        entry.tensor.copy_(saved[entry.key])
    second.restore(step=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for _ in range(3):
        for model, optimizer in ((one, first), (two, second)):
            grads_of(model, x)
            optimizer.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
