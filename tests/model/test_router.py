from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeforge.config.model import MoEConfig
from moeforge.kernels import normalize_logits
from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups
from moeforge.model.router import Router, auxiliary_loss, capacity, group_load, group_rank

D = 6


def make_router(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Router:
    values = {"num_experts": 5, "top_k": 2, "expert_size": 4, "gate_norm": 1.0} | changes
    router = Router(D, MoEConfig(**values), layer=3).to(dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def make_record(
    router: Router, routed: int, micro_batches: int = 1, alpha: float = 0.5, **changes: Any
) -> RouterRecord:
    return RouterRecord(
        (3,),
        router.moe.num_experts,
        micro_batches,
        torch.tensor([alpha], dtype=torch.float64),
        routed,
        **changes,
    )


def context(groups: RoutingGroups | None, record: RouterRecord | None = None, micro_batch: int = 0) -> ForwardContext:
    return ForwardContext(DenseAttention(1, 1), groups=groups, record=record, micro_batch=micro_batch)


def raw_logits(router: Router, x: Tensor) -> Tensor:
    z = x @ router.weight.t()
    return z if router.bias is None else z + router.bias


def probabilities(router: Router, x: Tensor) -> Tensor:
    """Gate probabilities written by hand."""
    z = raw_logits(router, x)
    scale = router.moe.gate_norm if router.scale is None else router.scale
    if scale is not None:
        z = scale * (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    return z.softmax(1)


def brute_force_drops(
    experts: list[list[int]], e: int, factor: float, groups: int, valid: list[bool]
) -> tuple[list[list[bool]], int]:
    """Token by token: which assignments fit, and how many do not."""
    tokens, k = len(experts), len(experts[0])
    size = tokens // groups
    kept, overflow = [], 0
    for g in range(groups):
        members = range(g * size, (g + 1) * size)
        room = math.ceil(factor * k * sum(valid[t] for t in members) / e)
        taken = [0] * e
        for t in members:
            row = []
            for expert in experts[t]:
                fits = valid[t] and taken[expert] < room
                overflow += valid[t] and not fits
                taken[expert] += valid[t]
                row.append(fits)
            kept.append(row)
    return kept, overflow


@st.composite
def routed(draw: st.DrawFn) -> tuple[int, int, int, int, list[bool] | None, float, int]:
    e = draw(st.integers(3, 6))
    k = draw(st.integers(2, e))
    groups = draw(st.integers(1, 3))
    tokens = groups * draw(st.integers(1, 8))
    valid = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    factor = draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0]))
    return e, k, groups, tokens, valid, factor, draw(st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(routed(), st.booleans())
def test_capacity_drops_exactly_the_overflow_in_token_order(case: tuple[Any, ...], drop: bool) -> None:
    e, k, n, tokens, valid, factor, seed = case
    router = make_router(num_experts=e, top_k=k, seed=seed)
    x = torch.randn(tokens, D, dtype=torch.float64)
    valid_T = None if valid is None else torch.tensor(valid)
    record = make_record(router, tokens)
    _, routing = router(x, context(RoutingGroups(n, valid_T, factor, drop), record))
    flags = valid or [True] * tokens
    kept, overflow = brute_force_drops(routing.experts_TK.tolist(), e, factor, n, flags)
    totals = record.totals()
    # The virtual drop rate of a dropless run is the same count.
    assert totals["overflow"].item() == overflow
    assert totals["assignments"].item() == k * sum(flags)
    assert totals["tokens"].item() == sum(flags)
    counted = [0] * e
    for row, flag in zip(routing.experts_TK.tolist(), flags, strict=True):
        for expert in row:
            counted[expert] += flag
    assert totals["load"][0].tolist() == counted
    if drop:
        assert routing.kept_TK.tolist() == kept
    elif valid is None:
        assert routing.kept_TK is None
    else:
        assert routing.kept_TK.tolist() == [[flag] * k for flag in flags]


def test_group_load_and_rank_count_within_each_group() -> None:
    experts = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 0]])
    groups = RoutingGroups(2)
    assert group_load(experts, 3, groups).tolist() == [[2, 2, 0], [1, 1, 2]]
    assert group_rank(experts, 3, groups).tolist() == [[0, 0], [1, 1], [0, 0], [1, 0]]
    groups = RoutingGroups(1, torch.tensor([True, False, True, True]))
    assert group_load(experts, 3, groups).tolist() == [[2, 2, 2]]
    assert group_rank(experts, 3, groups)[[0, 2, 3]].tolist() == [[0, 0], [1, 0], [1, 1]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 6), st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_group_load_and_rank_equal_a_count_by_hand(n: int, size: int, k: int, seed: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    e, tokens = 4, n * size
    # As torch's gate gives them: the first columns of an order of all experts, so rows are apart.
    experts = torch.rand(tokens, e, generator=generator).argsort(1)[:, :k]
    valid = torch.rand(tokens, generator=generator) < 0.6 if padded else torch.ones(tokens, dtype=torch.bool)
    groups = RoutingGroups(n, valid if padded else None)
    load, rank = group_load(experts, e, groups), group_rank(experts, e, groups)
    assert load.dtype == rank.dtype == torch.int64 and load.shape == (n, e) and rank.shape == experts.shape
    counted = [[0] * e for _ in range(n)]
    for token in range(tokens):
        if valid[token]:
            group = counted[token // size]
            assert rank[token].tolist() == [group[j] for j in experts[token].tolist()]
            for j in experts[token].tolist():
                group[j] += 1
    assert load.tolist() == counted


def test_capacity_rounds_up() -> None:
    assert capacity(torch.tensor([8, 9, 0]), 4, 1.25).tolist() == [3, 3, 0]


# Auxiliary losses, each written by hand from its paper.


def written_loss(kind: str, g: Tensor, experts: Tensor, groups: int, valid: Tensor) -> Tensor:
    """Token-weighted sum over groups, from gate probabilities g [T, E] and choices [T, K]."""
    e, total = g.shape[1], g.new_zeros(())
    size = len(g) // groups
    for group in range(groups):
        members = [t for t in range(group * size, (group + 1) * size) if valid[t]]
        if not members:
            continue
        mean = torch.stack([g[t] for t in members]).mean(0)
        if kind == "skywork":
            loss = sum((1 / e - mean[j]) ** 2 for j in range(e))
        else:
            counted = range(len(g)) if kind == "global" else members
            chosen = [int(j) for t in counted if valid[t] for j in experts[t]]
            loss = e * sum(chosen.count(j) / len(chosen) * mean[j] for j in range(e))
        total = total + loss * len(members)
    return total


KINDS = ["skywork", "switch", "sequence", "global"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changes", [{}, {"gate_norm_learned": True, "router_bias": True}, {"gate_norm": None}])
def test_auxiliary_gradient_is_that_of_the_written_formula(kind: str, padded: bool, changes: dict[str, Any]) -> None:
    router = make_router(**changes)
    groups, tokens, routed_tokens, alpha = 3, 12, 100, 0.7
    torch.manual_seed(1)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(tokens) < 0.6 if padded else torch.ones(tokens, dtype=torch.bool)
    if padded:
        valid[4:8] = False  # a group of nothing but padding
    record = make_record(router, routed_tokens, alpha=alpha, aux_loss=kind)
    out, routing = router(x, context(RoutingGroups(groups, valid if padded else None), record))
    assert torch.equal(out, x)
    leaves = [x, *router.parameters()]
    # A loss that is zero wherever it is: what arrives is the auxiliary gradient alone.
    ours = torch.autograd.grad((out * 0).sum(), leaves)
    written = written_loss(kind, probabilities(router, x), routing.experts_TK, groups, valid)
    theirs = torch.autograd.grad(written * alpha / routed_tokens, leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert record.totals()["aux"].item() == pytest.approx(written.item(), rel=1e-10)
    if padded:
        assert torch.equal(ours[0][~valid], torch.zeros_like(ours[0][~valid]))


def test_equation_4_by_finite_differences_on_the_logits() -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        mean = normalize_logits(z, 1.0).softmax(1).view(2, 3, 4).mean(1)
        return auxiliary_loss("skywork", mean, torch.zeros(2, 4)).sum()

    assert torch.autograd.gradcheck(loss, (z,))


def test_scale_of_the_variants() -> None:
    """At f = P the gradient of equation 4 is E / 2 times smaller than that of Switch."""
    torch.manual_seed(0)
    e = 8
    p = torch.rand(1, e, dtype=torch.float64).softmax(1).requires_grad_()
    assigned = torch.tensor([1000.0], dtype=torch.float64)
    (skywork,) = torch.autograd.grad(auxiliary_loss("skywork", p, p * assigned).sum(), p)
    (switch,) = torch.autograd.grad(auxiliary_loss("switch", p, p.detach() * assigned).sum(), p)
    # Constants over experts vanish in the softmax's backward.
    skywork, switch = skywork - skywork.mean(), switch - switch.mean()
    torch.testing.assert_close(skywork * e / 2, switch)


def test_perfect_balance_costs_nothing_or_one() -> None:
    p = torch.full((2, 4), 0.25)
    load = torch.full((2, 4), 3)
    assert auxiliary_loss("skywork", p, load).tolist() == [0.0, 0.0]
    assert auxiliary_loss("switch", p, load).tolist() == [1.0, 1.0]


def test_global_uses_the_running_load_of_the_step() -> None:
    router = make_router()
    record = make_record(router, 24, micro_batches=3, aux_loss="global")
    seen = []
    for m in range(3):
        torch.manual_seed(m)
        x = torch.randn(8, D, dtype=torch.float64, requires_grad=True)
        out, routing = router(x, context(RoutingGroups(2), record, m))
        seen.append((x, out, routing.experts_TK))
    for m, (x, out, _) in enumerate(seen):  # backward after all forwards, as a pipeline does it
        loads = torch.bincount(torch.cat([experts.flatten() for *_, experts in seen[: m + 1]]), minlength=5)
        mean = probabilities(router, x).view(2, 4, 5).mean(1)
        written = 4 * 5 * (loads.double() / loads.sum() * mean).sum()
        (ours,) = torch.autograd.grad((out * 0).sum(), x)
        (theirs,) = torch.autograd.grad(written * 0.5 / 24, x)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_none_attaches_nothing() -> None:
    router = make_router()
    record = make_record(router, 8, aux_loss="none")
    x = torch.randn(8, D, dtype=torch.float64, requires_grad=True)
    out, _ = router(x, context(RoutingGroups(1), record))
    assert out is x and record.totals()["aux"].item() == 0
    assert record.totals()["tokens"].item() == 8


def test_statistics_by_hand() -> None:
    router = make_router(gate_norm=2.0)
    torch.manual_seed(0)
    x = torch.randn(10, D, dtype=torch.float64)
    valid = torch.arange(10) != 4
    record = make_record(router, 9, distributions=True)
    router(x, context(RoutingGroups(2, valid), record))
    totals = {name: value[0] for name, value in record.totals().items()}
    g = probabilities(router, x)[valid]
    sorted_g = g.sort(1, descending=True).values
    expected = {
        "entropy": -(g * g.log()).sum(),
        "max1_over_max2": (sorted_g[:, 0] / sorted_g[:, 1]).sum(),
        "max2_over_max3": (sorted_g[:, 1] / sorted_g[:, 2]).sum(),
        "probability": g.sum(0),
        "sorted": sorted_g.sum(0),
        "sorted_unnormalised": raw_logits(router, x)[valid].softmax(1).sort(1, descending=True).values.sum(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(totals[name], value.detach(), rtol=1e-10, atol=1e-12)


def test_statistics_of_a_saturated_gate_are_finite() -> None:
    router = make_router(torch.float32, gate_norm=None)
    with torch.no_grad():
        router.weight.mul_(1e4)
    record = make_record(router, 3)
    router(torch.randn(4, D), context(RoutingGroups(1, torch.tensor([True, True, False, True])), record))
    assert torch.isfinite(record.values).all()


def test_gate_is_computed_in_float32_from_bf16() -> None:
    router = make_router(torch.bfloat16, router_bias=True)
    x = torch.randn(8, D).bfloat16()
    _, routing = router(x, context(None))
    assert routing.weights_TK.dtype == torch.float32
    wide = make_router(torch.float32, router_bias=True)
    wide.load_state_dict(router.state_dict())
    _, expected = wide(x.float(), context(None))
    assert torch.equal(routing.weights_TK, expected.weights_TK)
    assert torch.equal(routing.experts_TK, expected.experts_TK)


def test_float64_stays_float64() -> None:
    for changes in (
        {},
        {"gate_norm_learned": True, "router_bias": True},
        {"gate_norm": None, "renormalize": False},
    ):
        router = make_router(**changes)
        x = torch.randn(8, D, dtype=torch.float64)
        out, routing = router(x, context(RoutingGroups(1), make_record(router, 8)))
        assert out.dtype == routing.weights_TK.dtype == torch.float64


def test_reset_is_not_zero() -> None:
    router = make_router(router_bias=True, gate_norm=2.0, gate_norm_learned=True)
    router.reset_parameters(0.02)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.5)
    assert router.scale.item() == 2.0 and torch.equal(router.bias, torch.zeros(5, dtype=torch.float64))


# In the whole model.


def step(
    run: Callable[..., Any],
    model: Any,
    tokens: Tensor,
    targets: Tensor,
    micro: int,
    documents: Tensor | None = None,
    alpha: float = 0.5,
    group_sequences: int = 1,
    drop: bool = False,
    aux_loss: str = "skywork",
    factor: float = 1.0,
) -> tuple[RouterRecord, float, dict[str, Tensor]]:
    """One optimiser step over micro-batches of `micro` sequences: record, loss and gradients."""
    model.zero_grad()
    b, s = tokens.shape
    valid = None if documents is None else documents >= 0
    routed = b * s if valid is None else int(valid.sum())
    layers = model.config.moe_layers
    record = RouterRecord(
        layers,
        model.config.moe.num_experts,
        b // micro,
        torch.full((len(layers),), alpha, dtype=torch.float64),
        routed,
        aux_loss,
    )
    loss = 0.0
    for m in range(b // micro):
        rows = slice(m * micro, (m + 1) * micro)
        groups = RoutingGroups(micro // group_sequences, None if valid is None else valid[rows].flatten(), factor, drop)
        hidden, ctx = run(
            model,
            tokens[rows],
            None if documents is None else documents[rows],
            groups=groups,
            record=record,
            micro_batch=m,
        )
        part = model.loss(hidden, targets[rows].flatten(), ctx) / routed
        part.backward()
        loss += part.item()
    return record, loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_the_reported_loss_does_not_know_alpha(
    config: Callable[..., Any], build: Callable[..., Any], inputs: Callable[..., Any], run: Callable[..., Any]
) -> None:
    model = build(config(moe={}))
    tokens, targets = inputs(2, 8)
    _, off, gradients_off = step(run, model, tokens, targets, 2, alpha=0.0)
    _, on, gradients_on = step(run, model, tokens, targets, 2, alpha=5.0)
    assert on == off
    name = "layers.1.ffn.router.weight"
    assert not torch.allclose(gradients_off[name], gradients_on[name])
    # Nothing after the last router feels it.
    assert torch.equal(gradients_off["head.weight"], gradients_on["head.weight"])


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("aux_loss", ["skywork", "switch"])
def test_micro_batches_do_not_change_the_step(
    drop: bool,
    aux_loss: str,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    model = build(config(moe={}))
    tokens, targets = inputs(4, 8)
    documents = torch.zeros(4, 8, dtype=torch.int64)
    documents[2, 5:] = -1
    targets[2, 4:] = -100
    whole = step(run, model, tokens, targets, 4, documents, drop=drop, aux_loss=aux_loss)
    for micro in (1, 2):
        record, loss, gradients = step(run, model, tokens, targets, micro, documents, drop=drop, aux_loss=aux_loss)
        assert loss == pytest.approx(whole[1], rel=1e-12)
        for name, value in record.totals().items():
            expected = whole[0].totals()[name]
            if name in ("tokens", "assignments", "overflow", "load"):
                assert torch.equal(value, expected)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[2][name], rtol=1e-9, atol=1e-13)
    assert whole[0].totals()["overflow"].sum() > 0


def test_groups_of_two_sequences(
    config: Callable[..., Any], build: Callable[..., Any], inputs: Callable[..., Any], run: Callable[..., Any]
) -> None:
    model = build(config(moe={}))
    tokens, targets = inputs(4, 8)
    pairs = [step(run, model, tokens, targets, m, group_sequences=2, drop=True)[0].totals() for m in (2, 4)]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-12, atol=1e-12)
    singles = step(run, model, tokens, targets, 4, drop=True)[0].totals()
    assert not torch.equal(pairs[0]["overflow"], singles["overflow"])


@pytest.mark.parametrize("drop", [False, True])
def test_recomputation_and_accumulation_leave_record_and_gradients_alone(
    drop: bool,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    model = build(config(moe={}))
    tokens, targets = inputs(4, 8)
    for aux_loss in KINDS:
        model.recompute = ()
        kept = step(run, model, tokens, targets, 2, drop=drop, aux_loss=aux_loss)
        model.recompute = [name for name, _ in model.units() if name.startswith("layers")]
        again = step(run, model, tokens, targets, 2, drop=drop, aux_loss=aux_loss)
        assert torch.equal(kept[0].values, again[0].values) and kept[1] == again[1]
        for name, gradient in kept[2].items():
            assert torch.equal(gradient, again[2][name]), name


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("aux_loss", KINDS)
def test_padding_is_neither_routed_nor_counted(
    drop: bool,
    aux_loss: str,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    model = build(config(moe={}))
    tokens, targets = inputs(4, 8)
    documents = torch.zeros(4, 8, dtype=torch.int64)
    documents[0, 6:], documents[1, 3:], documents[3] = -1, -1, -1
    padding = documents < 0
    targets = targets.masked_fill(padding, -100)
    first = step(run, model, tokens, targets, 2, documents, drop=drop, aux_loss=aux_loss)
    other = tokens.where(~padding, (tokens + 11) % 37)
    second = step(run, model, other, targets, 2, documents, drop=drop, aux_loss=aux_loss)
    assert torch.equal(first[0].values, second[0].values)
    assert first[1] == second[1]
    for name, gradient in first[2].items():
        torch.testing.assert_close(gradient, second[2][name], rtol=1e-12, atol=1e-15)
    assert first[0].totals()["tokens"].tolist() == [int((~padding).sum())] * 2
    # And a sequence cut before its padding is the same sequence.
    alone = step(run, model, tokens[1:2, :3], targets[1:2, :3], 1)[0].totals()
    padded = step(run, model, tokens[1:2], targets[1:2], 1, documents[1:2])[0].totals()
    torch.testing.assert_close(alone, padded, rtol=1e-12, atol=1e-12)


def test_a_dropless_result_does_not_know_the_groups(
    config: Callable[..., Any], build: Callable[..., Any], inputs: Callable[..., Any], run: Callable[..., Any]
) -> None:
    model = build(config(moe={}))
    tokens, _ = inputs(4, 8)
    plain, _ = run(model, tokens)
    for count in (1, 2, 4):
        grouped, _ = run(model, tokens, groups=RoutingGroups(count, capacity_factor=0.1))
        assert torch.equal(plain, grouped)
    dropped, _ = run(model, tokens, groups=RoutingGroups(4, capacity_factor=0.1, drop=True))
    assert not torch.allclose(plain, dropped)
