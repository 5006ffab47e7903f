from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moeforge.kernels import expert_mlp_reference
from moeforge.layout import Layout, Stage, unit_names
from moeforge.model import RouterRecord, RoutingGroups, Transformer, units

D, F, V, HD = 16, 32, 37, 4
ATTENTION = {"norm.weight": (D,), "qkv.weight": (8 * HD, D), "o.weight": (D, 4 * HD)}
DENSE = {"norm.weight": (D,), "w13.weight": (2 * F, D), "w2.weight": (D, F)}
MOE = {"norm.weight": (D,), "router.weight": (4, D), "experts.w13": (4, 32, D), "experts.w2": (4, D, 16)}
ENDS = {"embed.weight": (V, D), "head.norm.weight": (D,), "head.weight": (V, D)}


def expected_names(*feed_forwards: dict[str, Any], attention: dict[str, Any] = ATTENTION) -> dict[str, Any]:
    names = dict(ENDS)
    for layer, ffn in enumerate(feed_forwards):
        names |= {f"layers.{layer}.attention.{key}": shape for key, shape in attention.items()}
        names |= {f"layers.{layer}.ffn.{key}": shape for key, shape in ffn.items()}
    return names


def shapes(model: Transformer) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_names_and_shapes_of_the_parameters(config: Callable[..., Any], build: Callable[..., Any]) -> None:
    def of(**changes: Any) -> dict[str, Any]:
        model = build(config(**changes))
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
        assert sum(p.numel() for p in model.parameters()) == model.config.parameters()
        return shapes(model)

    assert of() == expected_names(DENSE, DENSE)
    assert of(moe={}) == expected_names(MOE, MOE)
    assert of(moe={"layer_frequency": 2}) == expected_names(DENSE, MOE)
    learned = MOE | {"router.bias": (4,), "router.scale": ()}
    assert of(moe={"router_bias": True, "gate_norm_learned": True}) == expected_names(learned, learned)
    tied = expected_names(DENSE, DENSE)
    del tied["head.weight"]
    assert of(tie_embeddings=True) == tied
    biased = ATTENTION | {"qkv.bias": (8 * HD,), "o.bias": (D,)}
    assert of(qkv_bias=True, output_bias=True) == expected_names(DENSE, DENSE, attention=biased)
    head = ATTENTION | {"q_norm.weight": (HD,), "k_norm.weight": (HD,)}
    assert of(qk_norm="head") == expected_names(DENSE, DENSE, attention=head)
    full = ATTENTION | {"q_norm.weight": (4 * HD,), "k_norm.weight": (2 * HD,)}
    assert of(qk_norm="full") == expected_names(DENSE, DENSE, attention=full)


def test_units_in_order(config: Callable[..., Any], build: Callable[..., Any]) -> None:
    model = build(config())
    assert tuple(name for name, _ in model.units()) == unit_names(model.config)


def test_reset_parameters(config: Callable[..., Any], build: Callable[..., Any]) -> None:
    model = build(config(moe={"gate_norm_learned": True, "router_bias": True}, qk_norm="head", qkv_bias=True))
    model.reset_parameters(0.02)
    for name, parameter in model.named_parameters():
        if "norm.weight" in name or name.endswith("scale"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            assert 0.01 < parameter.std().item() < 0.03, name


def gradients(model: Transformer, run: Callable[..., Any], inputs: Any, **context: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens, targets = inputs
    hidden, ctx = run(model, tokens, **context)
    loss = model.loss(hidden, targets.flatten(), ctx)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied, biases": {"tie_embeddings": True, "qkv_bias": True, "output_bias": True},
    "head norm, window": {"qk_norm": "head", "sliding_window": 3, "sliding_window_first_layer": 1},
    "moe": {"moe": {}},
    "moe everything": {
        "moe": {"router_bias": True, "gate_norm_learned": True, "layer_frequency": 2, "top_k": 3},
        "qk_norm": "full",
    },
    "moe plain top-1": {"moe": {"gate_norm": None, "renormalize": False, "top_k": 1}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_by_directional_differences(
    variant: str, config: Callable[..., Any], build: Callable[..., Any], inputs: Any, run: Callable[..., Any]
) -> None:
    """The whole model in float64: along a random direction the loss moves as the gradients say."""
    model = build(config(**VARIANTS[variant]))
    batch = inputs(2, 6)
    found = gradients(model, run, batch)
    generator = torch.Generator().manual_seed(1)
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                hidden, ctx = run(model, batch[0])
                losses.append(model.loss(hidden, batch[1].flatten(), ctx).item())
                parameter.sub_(direction, alpha=sign * step)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx((found[name] * direction).sum().item(), rel=1e-5, abs=1e-6), name


def test_grouped_experts_train_as_the_reference_loop_does(
    monkeypatch: pytest.MonkeyPatch,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Any,
    run: Callable[..., Any],
) -> None:
    batch = inputs(2, 16)
    shape = config(moe={})
    grouped = gradients(build(shape, torch.float32), run, batch)
    exact = gradients(build(shape, torch.float64), run, batch)
    monkeypatch.setattr(units, "expert_mlp", expert_mlp_reference)
    loop = gradients(build(shape, torch.float32), run, batch)
    assert all(torch.equal(value, exact[name]) for name, value in gradients(build(shape), run, batch).items())
    for name, value in grouped.items():
        size = float(exact[name].abs().max())
        torch.testing.assert_close(value, loop[name], rtol=1e-5, atol=1e-5 * size)
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_changes_no_bit(
    variant: str,
    dtype: torch.dtype,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Any,
    run: Callable[..., Any],
) -> None:
    model = build(config(**VARIANTS[variant]), dtype)
    batch = inputs(2, 8)
    kept = gradients(model, run, batch)
    for chosen in (["layers.1.ffn"], unit_names(model.config)[1:-1]):
        model.recompute = chosen
        for name, value in gradients(model, run, batch).items():
            assert value.dtype == (torch.float32 if name == "loss" and dtype == torch.bfloat16 else dtype)
            assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("moe", [None, {}, {"layer_frequency": 2}])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_equal_separate_ones(
    moe: dict[str, Any] | None,
    window: int | None,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Any,
    run: Callable[..., Any],
) -> None:
    model = build(config(moe=moe, sliding_window=window))
    tokens, targets = inputs(1, 12)
    lengths = [5, 1, 6]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]

    def packed(documents: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        hidden, ctx = run(model, tokens, documents)
        model.loss(hidden, targets.flatten(), ctx).backward()
        return {"hidden": hidden.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}

    ours = packed(documents)
    model.zero_grad()
    separate = []
    for part, target in zip(tokens.split(lengths, 1), targets.split(lengths, 1), strict=True):
        hidden, ctx = run(model, part)
        model.loss(hidden, target.flatten(), ctx).backward()
        separate.append(hidden.detach())
    torch.testing.assert_close(ours["hidden"], torch.cat(separate), rtol=1e-10, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[name], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(packed(None)["hidden"], ours["hidden"])


def test_chosen_rows_of_logits_and_the_loss(
    config: Callable[..., Any], build: Callable[..., Any], inputs: Any, run: Callable[..., Any]
) -> None:
    for tied in (False, True):
        model = build(config(tie_embeddings=tied))
        tokens, targets = inputs(2, 5)
        hidden, ctx = run(model, tokens)
        logits = model.logits(hidden, ctx)
        assert logits.shape == (10, V)
        rows = torch.tensor([9, 0])
        torch.testing.assert_close(model.logits(hidden[rows], ctx), logits[rows])
        ignored = targets.flatten().clone()
        ignored[3] = -100
        expected = torch.nn.functional.cross_entropy(logits, ignored, reduction="sum")
        torch.testing.assert_close(model.loss(hidden, ignored, ctx), expected)


@pytest.mark.parametrize("moe", [None, {}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens(
    moe: dict[str, Any] | None,
    dtype: torch.dtype,
    config: Callable[..., Any],
    build: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    model = build(config(moe=moe), dtype)
    hidden, ctx = run(model, torch.zeros(2, 0, dtype=torch.int64))
    assert hidden.shape == (0, D)
    assert model.logits(hidden, ctx).shape == (0, V)
    loss = model.loss(hidden, torch.zeros(0, dtype=torch.int64), ctx)
    assert loss.item() == 0
    loss.backward()


# Pipeline cuts: every one of them, also in the middle of a layer.


@pytest.mark.parametrize("cut", range(1, 6))
def test_two_stages_equal_the_whole(
    cut: int, config: Callable[..., Any], build: Callable[..., Any], inputs: Any, run: Callable[..., Any]
) -> None:
    shape = config(moe={})
    single = Layout.single(shape, "ffn")
    recompute = single.stages[0].recompute
    names = unit_names(shape)
    stages = tuple(
        Stage(begin, end, tuple(n for n in recompute if n in names[begin:end]))
        for begin, end in ((0, cut), (cut, len(names)))
    )
    layout = dataclasses.replace(single, stages=stages, world_size=2, pp=2)
    layout.check(shape, 2)
    whole = build(shape, layout=single)
    first, second = (build(shape, layout=layout, stage=stage) for stage in (0, 1))
    state = whole.state_dict()
    assert {*first.state_dict(), *second.state_dict()} == set(state)
    assert not {*first.state_dict()} & {*second.state_dict()}
    for part in (first, second):
        part.load_state_dict({name: state[name] for name in part.state_dict()})

    tokens, targets = inputs(2, 8)
    alpha = torch.tensor([0.5, 0.7], dtype=torch.float64)
    groups = RoutingGroups(2, capacity_factor=1.0, drop=True)

    def record() -> RouterRecord:
        return RouterRecord(shape.moe_layers, 4, 1, alpha, 16)

    expected_record, found_record = record(), record()
    expected, ctx = run(whole, tokens, groups=groups, record=expected_record)
    whole.loss(expected, targets.flatten(), ctx).backward()

    positions = torch.arange(8).repeat(2)
    ctx = dataclasses.replace(ctx, record=found_record)
    sent = first(tokens.flatten(), positions, ctx)
    assert sent._base is None  # never a view: a pipeline frees it
    received = sent.detach().requires_grad_()
    hidden = second(tokens.flatten(), positions, ctx, received)
    second.loss(hidden, targets.flatten(), ctx).backward()
    sent.backward(received.grad)
    assert torch.equal(hidden, expected)
    assert torch.equal(found_record.values, expected_record.values)
    for part in (first, second):
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter.grad, whole.get_parameter(name).grad), name
