"""Seam 3 of many ranks against one process: each operation alone, then whole dense models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeforge.config.model import ModelConfig
from moeforge.kernels import rms_norm
from moeforge.layout import Layout, build_layout
from moeforge.model import DenseAttention, ForwardContext, Transformer
from moeforge.model.shard import SingleShard
from moeforge.parallel import Mesh
from moeforge.parallel.parameters import parameter_parts
from moeforge.parallel.shard import TensorParallelShard

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
VOCABULARY, HIDDEN, WIDTH = 13, 6, 10
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=20,
)  # fmt: skip
# What every rank holds of the vocabulary, and of WIDTH columns of an activation.
SPLITS = {
    "tp2": ((5, 8), (7, 3)),
    "tp3, one without rows, one without columns": ((0, 9, 4), (4, 6, 0)),
    "tp4, every other one without rows": ((6, 0, 7, 0), (0, 3, 3, 4)),
}
# Fewer tokens than ranks, shares that do not divide, ranks of padding alone, shares that divide.
TOKENS = (1, 2, 5, 12)
single = SingleShard()


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """`checkpoint` imports much at its first call: here, once, instead of in every rank."""
    checkpoint(torch.tanh, torch.ones(1, requires_grad=True), use_reentrant=False)


def span(sizes: tuple[int, ...], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def mesh_of(rows: tuple[int, ...]) -> Mesh:
    layout = build_layout(CONFIG, tp=len(rows))
    spans = [span(rows, rank) for rank in range(len(rows))]
    ranks = tuple(replace(r, vocab_rows=(s.start, s.stop)) for r, s in zip(layout.ranks, spans, strict=True))
    layout = replace(layout, ranks=ranks)
    layout.check(CONFIG, len(rows))
    return Mesh.create(layout, CPU)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A leaf with the same values on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def tokens_and_targets(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids, targets = torch.randint(VOCABULARY, (2, tokens), generator=generator)
    return ids, targets.masked_fill(targets % 4 == 0, -100)


def share(shard: TensorParallelShard, x: Tensor) -> Tensor:
    """Own rows of all T, filled with zeros."""
    begin = shard.tp.index * shard.share
    return F.pad(x, (0, 0, 0, shard.missing))[begin : begin + shard.share]


def near(found: Tensor | None, wanted: Tensor | None, dtype: torch.dtype = torch.float64) -> None:
    assert found is not None and wanted is not None and found.dtype == dtype
    tolerance = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-5, 1e-5)}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance[0], atol=tolerance[1])


def column_and_row_parallel(shard: TensorParallelShard, columns: slice, again: bool, dtype: torch.dtype) -> None:
    """leave(tanh(enter(x) a) b) with split a and b."""
    x, a, b, weights = (
        random(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate([(shard.tokens, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (shard.tokens, HIDDEN)])
    )
    wanted = F.linear(F.linear(x, a).tanh(), b)
    (wanted * weights).sum().backward()

    x_tD, own_a, own_b = leaf(share(shard, x)), leaf(a[columns]), leaf(b[:, columns])

    def region(x_tD: Tensor) -> Tensor:
        inside = shard.enter(x_tD)
        assert inside.shape == x.shape
        return shard.leave(F.linear(F.linear(inside, own_a).tanh(), own_b))

    found = checkpoint(region, x_tD, use_reentrant=False) if again else region(x_tD)
    (found * share(shard, weights)).sum().backward()
    near(found.detach(), share(shard, wanted).detach(), dtype)
    near(x_tD.grad, share(shard, x.grad), dtype)  # type: ignore[arg-type]
    near(own_a.grad, a.grad[columns], dtype)  # type: ignore[index]
    near(own_b.grad, b.grad[:, columns], dtype)  # type: ignore[index]


def vocabulary(shard: TensorParallelShard, rows: slice, again: bool, dtype: torch.dtype) -> None:
    """Tied embedding: embed, then logits and loss, with one gradient for all of it."""
    weight = random(VOCABULARY, HIDDEN, dtype=dtype)
    ids, targets = tokens_and_targets(shard.tokens)
    hidden = single.embed(ids, weight).tanh()
    wanted = single.cross_entropy(hidden, weight, targets)
    hidden.retain_grad()
    (wanted * 0.3).backward()

    own = leaf(weight[rows])
    run = (lambda f, *args: checkpoint(f, *args, use_reentrant=False)) if again else (lambda f, *args: f(*args))
    x_tD = run(lambda w: shard.embed(ids, w), own).tanh()
    near(x_tD.detach(), share(shard, hidden).detach(), dtype)
    x_tD.retain_grad()
    near(shard.logits(x_tD, own), single.logits(hidden, weight).detach(), dtype)
    found = run(shard.cross_entropy, x_tD, own, targets)
    (found * 0.3).backward()
    near(found.detach(), wanted.detach(), dtype)
    near(x_tD.grad, share(shard, hidden.grad), dtype)  # type: ignore[arg-type]
    near(own.grad, weight.grad[rows], dtype)  # type: ignore[index]
    losses = shard.tp.all_gather(found.detach()[None])
    assert torch.equal(losses, losses[:1].expand_as(losses))


def norm(shard: TensorParallelShard, columns: slice, again: bool, dtype: torch.dtype) -> None:
    x, gain, weights = (
        random(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate([(shard.tokens, WIDTH), (WIDTH,), (shard.tokens, WIDTH)])
    )
    wanted = rms_norm(x, gain, 1e-3)
    (wanted * weights).sum().backward()
    own, own_gain = leaf(x[:, columns]), leaf(gain[columns])

    def region(x_TC: Tensor, gain_C: Tensor) -> Tensor:
        return shard.norm(x_TC, gain_C, 1e-3, WIDTH)

    found = checkpoint(region, own, own_gain, use_reentrant=False) if again else region(own, own_gain)
    (found * weights[:, columns]).sum().backward()
    near(found.detach(), wanted[:, columns].detach(), dtype)
    near(own.grad, x.grad[:, columns], dtype)  # type: ignore[index]
    near(own_gain.grad, gain.grad[columns], dtype)  # type: ignore[index]


def gathered(shard: TensorParallelShard, _: slice, again: bool, dtype: torch.dtype) -> None:
    """All ranks make the same of what they gather: the own share's gradient is the whole one's."""
    p, weights = (random(shard.tokens, 4, seed=seed, dtype=dtype) for seed in (0, 1))
    experts = torch.arange(3 * shard.tokens).view(-1, 3) * 11
    (p * weights).sum().backward()
    own = leaf(share(shard, p))

    def region(p_tE: Tensor) -> Tensor:
        found_p, found_experts = shard.gather_tokens(p_tE, share(shard, experts))
        assert torch.equal(found_p, p) and torch.equal(found_experts, experts)
        return (found_p * weights).sum()

    (checkpoint(region, own, use_reentrant=False) if again else region(own)).backward()
    near(own.grad, share(shard, p.grad), dtype)  # type: ignore[arg-type]

    kept, own_experts = experts % 2 == 0, share(shard, experts)
    found = shard.own_kept(kept, own_experts)
    assert found is not None and torch.equal(found, share(shard, kept))
    everything = shard.own_kept(None, own_experts)
    if shard.missing:  # filling rows are never routed
        assert everything is not None and torch.equal(everything, share(shard, torch.ones_like(kept)))
    else:
        assert everything is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_every_operation_and_its_gradients(
    split: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, run_ranks: RunRanks
) -> None:
    rows, columns = split

    def work(rank: int) -> None:
        mesh = mesh_of(rows)
        for tokens in TOKENS:
            shard = TensorParallelShard(mesh, tokens)
            for again in (False, True):
                column_and_row_parallel(shard, span(columns, rank), again, dtype)
                vocabulary(shard, span(rows, rank), again, dtype)
                norm(shard, span(columns, rank), again, dtype)
                gathered(shard, span(columns, rank), again, dtype)

    run_ranks(len(rows), work)


def test_one_rank_does_the_plain_thing_without_copies_or_collectives() -> None:
    mesh = Mesh.single(build_layout(CONFIG), CPU)
    shard = TensorParallelShard(mesh, 5)
    x, weight = random(5, HIDDEN), random(VOCABULARY, HIDDEN, seed=1)
    ids, targets = tokens_and_targets(5)
    assert shard.enter(x) is x and shard.leave(x) is x and shard.reduce_statistics(x) is x
    assert shard.gather_tokens(x, ids)[0] is x and shard.own_kept(None, ids) is None
    assert shard.own_kept(targets, ids) is targets
    assert torch.equal(shard.embed(ids, weight), single.embed(ids, weight))
    assert torch.equal(shard.logits(x, weight), single.logits(x, weight))
    assert torch.equal(shard.cross_entropy(x, weight, targets), single.cross_entropy(x, weight, targets))
    assert torch.equal(shard.norm(x, weight[0], 1e-5, HIDDEN), single.norm(x, weight[0], 1e-5, HIDDEN))
    assert not mesh.traffic.sent


def test_statistics_are_summed_over_other_sequences_alone(run_ranks: RunRanks) -> None:
    def work(rank: int) -> Tensor:
        shard = TensorParallelShard(Mesh.create(build_layout(CONFIG, dp=2, tp=2), CPU), 4)
        given = torch.tensor([1.0, 10.0**rank])
        found = shard.reduce_statistics(given)
        assert given.tolist() == [1.0, 10.0**rank]  # recomputation hands the same tensor in again
        return found

    assert [found.tolist() for found in run_ranks(4, work)] == [[2, 101], [2, 1010], [2, 101], [2, 1010]]


def test_bf16_activations_stay_bf16_with_float32_statistics(run_ranks: RunRanks) -> None:
    """Sums over ranks are rounded to the activations' type; norms and losses are not."""
    rows, columns = SPLITS["tp3, one without rows, one without columns"]

    def work(rank: int) -> None:
        shard = TensorParallelShard(mesh_of(rows), 5)
        x = random(5, HIDDEN, dtype=torch.bfloat16)
        weight = random(VOCABULARY, HIDDEN, seed=1, dtype=torch.bfloat16)
        ids, targets = tokens_and_targets(5)
        x_tD, own = leaf(share(shard, x)), leaf(weight[span(rows, rank)])
        assert torch.equal(shard.enter(x_tD), x)
        # Only one rank's part of a row is not zero: nothing is rounded.
        assert torch.equal(shard.embed(ids, own), share(shard, single.embed(ids, weight)))
        summed = shard.leave(x)
        assert summed.dtype == torch.bfloat16
        torch.testing.assert_close(summed, share(shard, 3 * x), rtol=2e-2, atol=0)
        loss = shard.cross_entropy(x_tD, own, targets)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(single.cross_entropy(x, weight, targets).item(), rel=1e-6)
        loss.backward()
        assert x_tD.grad is not None and x_tD.grad.dtype == torch.bfloat16
        wide = random(5, WIDTH, dtype=torch.bfloat16)
        gain = random(WIDTH, seed=1, dtype=torch.bfloat16)
        mine = span(columns, rank)
        normed = shard.norm(wide[:, mine], gain[mine], 1e-5, WIDTH)
        # The same but for the order in which squares are added up in float32.
        torch.testing.assert_close(normed, rms_norm(wide, gain, 1e-5)[:, mine], rtol=1e-2, atol=0)

    run_ranks(3, work)


MODELS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {}, {}),
    "tp2 tied, biases, norms of heads": (
        2,
        {"tie_embeddings": True, "qkv_bias": True, "output_bias": True, "qk_norm": "head"},
        {},
    ),
    "tp3, ranks without heads": (3, {"qk_norm": "full", "tie_embeddings": True}, {"weights": [1.0, 2.0, 1.0]}),
    "tp3, one rank holds nothing": (3, {"qk_norm": "full"}, {"weights": [2.0, 0.0, 1.0]}),
    "tp4, ranks without heads or columns": (4, {"num_kv_heads": 1, "ffn_size": 3, "output_bias": True}, {}),
    "tp2 dp2": (4, {"qkv_bias": True, "qk_norm": "head"}, {"tp": 2, "dp": 2}),
}
SEQUENCES, POSITIONS = 2, 5
# Seed of each data-parallel rank's tokens. Not 1: with "tp2 dp2", weights moved by half a unit of float32's last place
# turn its gradients, computed in float64, by 5e-5; no two float32 runs could agree to 1e-5.
SEEDS = (0, 2)


@torch.no_grad()
def filled(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Every parameter random, at a scale where attention is not flat; from seeds whose float32 gradients lose little to
    rounding on processors of both makers (those from 0 on lose 6e-6 on some)."""
    model = Transformer(config).to(dtype)
    for seed, (name, parameter) in enumerate(model.named_parameters(), 100):
        parameter.copy_(random(*parameter.shape, seed=seed) * 0.3 + (1 if "norm.weight" in name else 0))
    return model


def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens_T, positions_T and targets_T of the data-parallel rank `index`."""
    generator = torch.Generator().manual_seed(SEEDS[index])
    ids, targets = torch.randint(VOCABULARY, (2, SEQUENCES * POSITIONS), generator=generator)
    return ids, torch.arange(POSITIONS).repeat(SEQUENCES), targets.masked_fill(targets == 3, -100)


def one_process(model: Transformer, dp: int) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Logits of every data-parallel rank's tokens, the sum of their losses, and its gradients."""
    logits, total = [], torch.zeros((), dtype=model.output_weight.dtype)
    for index in range(dp):
        ids, positions, targets = batch(index)
        context = ForwardContext(DenseAttention(SEQUENCES, POSITIONS))
        hidden = model(ids, positions, context)
        logits.append(model.logits(hidden, context).detach())
        loss = model.loss(hidden, targets, context)
        loss.backward()
        total += loss.detach()
    return logits, total, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_models_are_as_uneven_as_they_say() -> None:
    def held(name: str, kind: str) -> list[set[int]]:
        world, changes, how = MODELS[name]
        layout = build_layout(replace(CONFIG, **changes), **({"tp": world} | how))
        return [{end - begin for begin, end in getattr(shard, kind)} for shard in layout.ranks]

    names = list(MODELS)
    assert any(0 in groups for groups in held(names[2], "kv_groups"))
    assert held(names[3], "kv_groups")[1] == held(names[3], "ffn_columns")[1] == {0}
    assert sum(0 in groups for groups in held(names[4], "kv_groups")) >= 3
    assert sum(0 in columns for columns in held(names[4], "ffn_columns")) >= 2


@pytest.mark.parametrize("name", MODELS)
def test_float32_fixtures_are_well_conditioned(name: str) -> None:
    """One process alone must not lose in float32 what many ranks are held to."""
    _, changes, how = MODELS[name]
    config, dp = replace(CONFIG, **changes), how.get("dp", 1)
    rounded = filled(config, torch.float32).double()
    *_, exact = one_process(rounded, dp)
    *_, found = one_process(filled(config, torch.float32), dp)
    for key, gradient in exact.items():
        error = (found[key] - gradient).norm() / gradient.norm()
        assert error < 5e-6, f"{key}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_dense_models(name: str, dtype: torch.dtype, run_ranks: RunRanks) -> None:
    world, changes, how = MODELS[name]
    config = replace(CONFIG, **changes)
    plain, again = (build_layout(config, recompute=r, **({"tp": world} | how)) for r in ("none", "all"))
    plain.check(config, world)
    wanted_logits, wanted_loss, wanted = one_process(filled(config, dtype), plain.dp)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5

    def work(rank: int) -> None:
        for layout in (plain, again):
            compare(Mesh.create(layout, CPU), layout)

    def compare(mesh: Mesh, layout: Layout) -> None:
        parts = parameter_parts(config, layout, 0, mesh.at.tp, mesh.at.expert_rank)
        model = Transformer(config, layout, rank=mesh.at.tp, expert_rank=mesh.at.expert_rank).to(dtype)
        whole = filled(config, dtype)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(parts[key].cut(whole.get_parameter(key)))
        ids, positions, targets = batch(mesh.at.dp)
        shard = TensorParallelShard(mesh, len(ids))
        context = ForwardContext(DenseAttention(SEQUENCES, POSITIONS), shard=shard)
        hidden = model(ids, positions, context)
        assert hidden.shape == (-(-len(ids) // layout.tp), config.hidden_size)
        near(model.logits(hidden, context), wanted_logits[mesh.at.dp], dtype)
        loss = model.loss(hidden, targets, context)
        loss.backward()
        near(mesh.dp.all_reduce(loss.detach().clone()), wanted_loss, dtype)
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            found = getattr(mesh, parts[key].reduce).all_reduce(parameter.grad)
            if found.numel():
                error = (found - parts[key].cut(wanted[key])).norm() / wanted[key].norm()
                assert error < tolerance, f"{key}: {error:.1e}"

    run_ranks(world, work)
