"""Steps of many ranks on gradients whose sums are known, against one process; and against FSDP2."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import Layout, build_layout
from moeforge.model import DenseAttention, ForwardContext, Transformer
from moeforge.parallel import Group, Mesh
from moeforge.parallel.parameters import ParameterPart, StateEntry, parameter_parts
from moeforge.train.optimizer import Optimizer

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
STEPS, MICRO = 3, 2
CONFIG = ModelConfig(
    vocab_size=13, hidden_size=6, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=2, ffn_size=20,
    qkv_bias=True, output_bias=True, qk_norm="full", tie_embeddings=True,
    moe=MoEConfig(5, 2, 7, gate_norm=1.0, gate_norm_learned=True, router_bias=True, layer_frequency=2),
)  # fmt: skip
LAYOUTS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "one": (CONFIG, {}),
    "dp2": (CONFIG, {"dp": 2}),
    "dp3": (replace(CONFIG, qk_norm="head"), {"dp": 3}),
    "tp2": (CONFIG, {"tp": 2}),
    "tp3, a rank without heads": (CONFIG, {"tp": 3}),
    "dp2 tp2 edp": (CONFIG, {"dp": 2, "tp": 2}),
    "dp2 tp2 ep": (replace(CONFIG, qk_norm="head"), {"dp": 2, "tp": 2, "ep": 4}),
    "dp2 tp2 etp": (CONFIG, {"dp": 2, "tp": 2, "ep": 2, "etp": 2}),
    "dp2 tp2, experts whole": (CONFIG, {"dp": 2, "tp": 2, "ep": 1}),
    "pp2 tied": (CONFIG, {"pp": 2}),
    "pp2 dp2 tied": (CONFIG, {"pp": 2, "dp": 2, "stages": [0.5, 2.5]}),
    "pp2 tp2 untied": (replace(CONFIG, tie_embeddings=False), {"pp": 2, "tp": 2}),
    "pp3, an empty stage, tied": (CONFIG, {"pp": 3, "stages": [2, 0, 1]}),
    "pp2 zbv, tied on one rank": (
        CONFIG,
        {"pp": 2, "dp": 2, "chunks": 2, "schedule": "zbv", "stages": [1, 0.5, 0.5, 1]},
    ),
}


@dataclass(frozen=True)
class Recipe:
    dtype: torch.dtype
    kind: str
    zero: bool
    clip: float = 0.0

    @property
    def tolerance(self) -> float:
        return 1e-12 if self.dtype == torch.float64 else 1e-6

    def optimizer(
        self, parameters: dict[str, nn.Parameter], parts: dict[str, ParameterPart], mesh: Mesh, **changes: Any
    ) -> Optimizer:
        settings: dict[str, Any] = {"masters": self.dtype == torch.bfloat16, "zero": self.zero, "kind": self.kind}
        settings |= {"clip_norm": self.clip, "weight_decay": 0.1, "expert_lr_scale": 0.5}
        return Optimizer(parameters, parts, mesh, **settings | changes)


RECIPES = {
    "sgd": Recipe(torch.float64, "sgd", True),
    "sgd without zero": Recipe(torch.float64, "sgd", False),
    "adamw clipped": Recipe(torch.float64, "adamw", True, clip=0.5),
    "adamw without zero": Recipe(torch.float64, "adamw", False, clip=0.5),
    "fp32": Recipe(torch.float32, "adamw", True, clip=0.5),
    "masters": Recipe(torch.bfloat16, "adamw", True, clip=0.5),
    "masters without zero": Recipe(torch.bfloat16, "adamw", False),
}


@cache
def drawn(label: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random(label: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every recipe's and every rank's own copy of the same numbers."""
    return drawn(label, tuple(shape)).to(dtype, copy=True)


def gradient(name: str, rank: int, step: int, micro: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """What a rank's backward pass gives, in the whole parameter's shape; sometimes nothing at all."""
    label = f"{name} {rank} {step} {micro}"
    return None if zlib.crc32(label.encode()) % 7 == 0 else random(label, shape, dtype)


def whole_parts(config: ModelConfig) -> dict[str, ParameterPart]:
    return parameter_parts(config, Layout.single(config), 0, 0, 0)


def held_by(config: ModelConfig, layout: Layout, rank: int) -> dict[str, ParameterPart]:
    at, found = layout.coordinates(rank), dict[str, ParameterPart]()
    for stage in layout.stages_of(at.pp):
        found |= parameter_parts(config, layout, stage, at.tp, at.expert_rank)
    return found


def feed(optimizer: Optimizer, weight: Tensor, grad: Tensor | None, masters: bool) -> None:
    """As a split backward pass does: assign, past autograd's hooks."""
    if grad is not None:
        weight.grad = grad if weight.grad is None else weight.grad + grad
        if masters:
            optimizer.collect()


@dataclass
class Result:
    norms: list[Tensor]
    weights: dict[str, Tensor]
    entries: list[StateEntry]


def train_all(rank: int, config: ModelConfig, layout: Layout) -> dict[str, Result]:
    """Every recipe on one rank."""
    mesh = Mesh.create(layout, CPU)
    return {name: train(mesh, config, recipe) for name, recipe in RECIPES.items()}


def train(mesh: Mesh, config: ModelConfig, recipe: Recipe) -> Result:
    """Some steps of one rank."""
    rank = mesh.rank
    whole, parts = whole_parts(config), held_by(config, mesh.layout, rank)
    parameters = {
        name: nn.Parameter(part.cut(random(name, whole[name].shape, recipe.dtype)).clone())
        for name, part in parts.items()
    }
    optimizer = recipe.optimizer(parameters, parts, mesh)
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO):
            for name, part in parts.items():
                grad = gradient(name, rank, step, micro, whole[name].shape, recipe.dtype)
                local = None if grad is None else part.cut(grad).clone()
                feed(optimizer, parameters[name], local, recipe.dtype == torch.bfloat16)
        norms.append(optimizer.step(1e-3).clone())
        assert all(parameter.grad is None for parameter in parameters.values())
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Result(norms, weights, optimizer.entries())


def train_in_one_process(config: ModelConfig, layout: Layout, recipe: Recipe) -> Result:
    """The same steps on the sums of all ranks' gradients."""
    single, parts = Layout.single(config), whole_parts(config)
    parameters = {name: nn.Parameter(random(name, part.shape, recipe.dtype)) for name, part in parts.items()}
    optimizer = recipe.optimizer(parameters, parts, Mesh.single(single, CPU))
    held = [held_by(config, layout, rank) for rank in range(layout.world_size)]
    norms = []
    for step in range(STEPS):
        for rank, theirs in enumerate(held):
            for micro in range(MICRO):
                for name, part in theirs.items():
                    grad = gradient(name, rank, step, micro, parts[name].shape, recipe.dtype)
                    if grad is not None:
                        placed = torch.zeros_like(grad)
                        part.place(placed, part.cut(grad))
                        feed(optimizer, parameters[name], placed, recipe.dtype == torch.bfloat16)
        norms.append(optimizer.step(1e-3).clone())
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return Result(norms, weights, optimizer.entries())


def assemble(entries: list[list[StateEntry]], config: ModelConfig) -> dict[str, Tensor]:
    """Whole masters and moments from what the ranks save; every element comes from one rank."""
    found, count = dict[str, Tensor](), dict[str, Tensor]()
    whole = whole_parts(config)
    for entry in (entry for of_rank in entries for entry in of_rank if entry.saved):
        shape = whole[entry.part.name].shape
        number = torch.arange(whole[entry.part.name].numel).view(shape)
        at = entry.part.cut(number).flatten()[entry.begin : entry.end]
        assert entry.tensor.shape == at.shape
        target = found.setdefault(entry.key, torch.zeros(shape, dtype=entry.tensor.dtype))
        target.view(-1)[at] = entry.tensor
        count.setdefault(entry.key, torch.zeros(shape)).view(-1)[at] += 1
    assert all(bool((times == 1).all()) for times in count.values())
    return found


def close(found: Tensor, wanted: Tensor, tolerance: float, label: str) -> None:
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{label}: {m}"
    )


@pytest.mark.parametrize("case", LAYOUTS)
def test_ranks_give_what_one_process_gives(case: str, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    config, sizes = LAYOUTS[case]
    layout = build_layout(config, **sizes)
    if case.startswith("dp2"):
        monkeypatch.setattr("moeforge.parallel.zero._BUCKET", 100)  # parameters above, at and below a bucket
    results: list[dict[str, Result]] = run_ranks(layout.world_size, train_all, config, layout)
    for name, recipe in RECIPES.items():
        compare(name, recipe, [result[name] for result in results], config, layout)


def compare(name: str, recipe: Recipe, ranks: list[Result], config: ModelConfig, layout: Layout) -> None:
    one = train_in_one_process(config, layout, recipe)
    for rank in ranks:
        assert all(torch.equal(norm, first) for norm, first in zip(rank.norms, ranks[0].norms, strict=True)), name
        for norm, wanted in zip(rank.norms, one.norms, strict=True):
            assert norm.shape == () and norm.item() == pytest.approx(wanted.item(), rel=recipe.tolerance), name

    state, wanted_state = assemble([rank.entries for rank in ranks], config), assemble([one.entries], config)
    assert state.keys() == wanted_state.keys()
    for key, value in wanted_state.items():
        close(state[key], value, recipe.tolerance, f"{name}: {key}")

    # Every copy of every weight is, to the last bit, what the owners computed.
    for number, rank in enumerate(ranks):
        for weight, part in held_by(config, layout, number).items():
            owned = part.cut(state[f"weight.{weight}"]).to(recipe.dtype)
            assert torch.equal(rank.weights[weight], owned), f"{name}: {weight} on rank {number}"


def state_bytes(result: Result) -> int:
    storages = {
        entry.tensor.untyped_storage().data_ptr(): entry.tensor.untyped_storage().nbytes()
        for entry in result.entries
        if entry.tensor.numel()
    }
    return sum(storages.values())


def counted_training(rank: int, config: ModelConfig, layout: Layout) -> tuple[Result, Counter[str]]:
    """Counts collectives in this process, which ends with the test's rank."""
    mesh, calls = Mesh.create(layout, CPU), Counter[str]()

    def count(name: str, original: Any) -> Any:
        def counted(self: Group, x: Tensor) -> Any:
            calls[name] += self.size > 1
            return original(self, x)

        return counted

    for name in ("all_reduce", "reduce_scatter", "all_gather"):
        setattr(Group, name, count(name, getattr(Group, name)))
    return train(mesh, config, RECIPES["masters"]), calls


def test_state_is_divided_and_collectives_are_few(run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = build_layout(CONFIG, dp=3)
    ranks: list[tuple[Result, Counter[str]]] = run_ranks(3, counted_training, CONFIG, layout)
    whole = train_in_one_process(CONFIG, layout, RECIPES["masters"])
    padding = 3 * 4 * len(whole.weights)  # master and two moments of one float32 element a parameter
    for rank, calls in ranks:
        assert state_bytes(rank) <= state_bytes(whole) / 3 + padding
        # Dense, replicated and expert parameters, once each a step; and the norm.
        assert calls == {"reduce_scatter": 3 * STEPS, "all_gather": 3 * STEPS, "all_reduce": STEPS}
    assert sum(state_bytes(rank) for rank, _ in ranks) == state_bytes(whole)
    monkeypatch.setattr("moeforge.parallel.zero._BUCKET", 1)  # but no collective is longer than it needs to be
    for _, calls in run_ranks(3, counted_training, CONFIG, layout):
        assert calls["reduce_scatter"] == calls["all_gather"] == len(whole.weights) * STEPS


def pure_bf16(rank: int) -> tuple[dict[str, Tensor], Tensor, set[torch.dtype]]:
    layout = build_layout(CONFIG, dp=2)
    parts = held_by(CONFIG, layout, rank)
    parameters = {name: nn.Parameter(random(name, part.shape, torch.bfloat16)) for name, part in parts.items()}
    recipe = Recipe(torch.bfloat16, "adamw", True)
    optimizer = recipe.optimizer(parameters, parts, Mesh.create(layout, CPU), masters=False)
    for name, parameter in parameters.items():
        parameter.grad = random(f"{name} {rank}", parts[name].shape, torch.bfloat16)
    norm = optimizer.step(1e-2)
    types = {entry.tensor.dtype for entry in optimizer.entries()}
    return {name: parameter.detach() for name, parameter in parameters.items()}, norm, types


def test_pure_bf16_sums_in_float32_and_keeps_its_state_in_bf16(run_ranks: RunRanks) -> None:
    ranks = run_ranks(2, pure_bf16)
    parts = whole_parts(CONFIG)
    parameters = {name: nn.Parameter(random(name, part.shape, torch.bfloat16)) for name, part in parts.items()}
    recipe = Recipe(torch.bfloat16, "adamw", True)
    mesh = Mesh.single(Layout.single(CONFIG), CPU)
    optimizer = recipe.optimizer(parameters, parts, mesh, masters=False)
    square = torch.zeros((), dtype=torch.float64)
    for name, parameter in parameters.items():
        exact = sum(random(f"{name} {rank}", parts[name].shape, torch.bfloat16).float() for rank in range(2))
        assert isinstance(exact, Tensor)
        parameter.grad = exact.bfloat16()
        square += exact.double().square().sum()
    optimizer.step(1e-2)
    for weights, norm, types in ranks:
        assert types == {torch.bfloat16}
        assert norm.item() == pytest.approx(square.sqrt().item(), rel=1e-6)  # not of the rounded sums
        assert all(torch.equal(weights[name], parameter) for name, parameter in parameters.items())


SEQUENCES, POSITIONS, CLIP, LR, DECAY = 4, 8, 0.2, 1e-3, 0.1
FSDP_CONFIG = ModelConfig(
    vocab_size=29, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24,
    moe=MoEConfig(4, 2, 8, gate_norm=1.0),
)  # fmt: skip


class Loss(nn.Module):
    """The model as a function of tokens alone, which is what FSDP2 wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(FSDP_CONFIG)
        for name, parameter in self.model.named_parameters():
            with torch.no_grad():
                parameter.copy_(random(name, tuple(parameter.shape), torch.float32) * 0.3 + ("norm" in name))

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor, count: int) -> Tensor:
        b, s = tokens_BS.shape
        context = ForwardContext(DenseAttention(b, s))
        hidden = self.model(tokens_BS.flatten(), torch.arange(s).repeat(b), context)
        return self.model.loss(hidden, targets_BS.flatten(), context) / count


def halves(rank: int, step: int) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(29, (2, SEQUENCES, POSITIONS), generator=generator)
    rows = slice(rank * SEQUENCES // 2, (rank + 1) * SEQUENCES // 2)
    return tokens[rows], targets[rows], targets.numel()


def ours(rank: int) -> tuple[list[float], dict[str, Tensor]]:
    layout, loss = build_layout(FSDP_CONFIG, dp=2), Loss()
    parameters = dict(loss.model.named_parameters())
    optimizer = Optimizer(
        parameters, held_by(FSDP_CONFIG, layout, rank), Mesh.create(layout, CPU), masters=False, clip_norm=CLIP,
        weight_decay=DECAY,
    )  # fmt: skip
    norms = []
    for step in range(STEPS):
        loss(*halves(rank, step)).backward()
        norms.append(optimizer.step(LR).item())
    return norms, {name: parameter.detach() for name, parameter in parameters.items()}


def fsdp2(rank: int) -> tuple[list[float], dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    loss = Loss()
    wrapped: Any = fully_shard(loss, mesh=init_device_mesh("cpu", (2,)))
    named = dict(loss.model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if (p.ndim > 1) == matrix], "weight_decay": DECAY * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step in range(STEPS):
        (wrapped(*halves(rank, step)) * 2).backward()  # FSDP2 means over the ranks what is to be summed
        norm = nn.utils.clip_grad_norm_(named.values(), CLIP)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
        optimizer.zero_grad()
    full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in named.items()}
    return norms, {name: weight.detach() for name, weight in full.items()}


def test_zero_agrees_with_fsdp2(run_ranks: RunRanks) -> None:
    (norms, weights), (_, other) = run_ranks(2, ours)
    fsdp_norms, fsdp_weights = run_ranks(2, fsdp2)[0]
    assert norms == pytest.approx(fsdp_norms, rel=1e-6) and min(norms) > CLIP
    start = dict(Loss().model.named_parameters())
    assert weights.keys() == fsdp_weights.keys() == start.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other[name])
        assert not torch.equal(weight, start[name])
        close(weight, fsdp_weights[name], 1e-6, name)
