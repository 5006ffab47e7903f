"""Experts made from a dense feed-forward: what each method promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu

from moeforge.upcycle.config import UpcycleConfig
from moeforge.upcycle.methods import FFN, donor_of, generator, make_expert, make_router

HIDDEN, WIDTH = 16, 48


def dense(seed: int = 0, dtype: torch.dtype = torch.float64) -> FFN:
    rng = torch.Generator().manual_seed(seed)
    w1, w3, w2 = (torch.randn(s, generator=rng) for s in [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)])
    return FFN(w1.to(dtype), w3.to(dtype), w2.to(dtype))


def apply(ffn: FFN, x_TD: Tensor) -> Tensor:
    return linear(silu(linear(x_TD, ffn.w1)) * linear(x_TD, ffn.w3), ffn.w2)


def moe(experts: list[FFN], router: Tensor, top_k: int, x_TD: Tensor, renormalize: bool = True) -> Tensor:
    """SKYWORK section 2, in a loop; ties break by expert index."""
    gates_TE = linear(x_TD, router.to(x_TD.dtype)).softmax(-1)
    order_TE = gates_TE.sort(dim=-1, descending=True, stable=True).indices
    out = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        chosen = order_TE[t, :top_k]
        weights = gates_TE[t, chosen]
        weights = weights / weights.sum() if renormalize else weights
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            out[t] += weight * apply(experts[e], x_D)
    return out


def build(config: UpcycleConfig, donors: list[FFN], layer: int = 0) -> tuple[list[FFN], Tensor]:
    experts = [make_expert(donors, config, layer, e) for e in range(config.num_experts)]
    return experts, make_router(HIDDEN, config, layer, donors[0].w1.dtype)


@given(st.integers(1, 5), st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_virtual_group_is_the_dense_function(copies: int, shards: int, used: int, seed: int) -> None:
    assume(copies * shards >= 2 and used <= copies)
    config = UpcycleConfig(
        num_experts=copies * shards,
        top_k=used * shards,
        method="virtual-group",
        granularity=shards,
        seed=seed,
    )
    ffn = dense(seed)
    experts, router = build(config, [ffn])
    x = torch.randn(9, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0] = 0  # every copy ties: the tie-break by index still takes whole copies
    torch.testing.assert_close(moe(experts, router, config.top_k, x), apply(ffn, x), rtol=1e-12, atol=1e-12)
    assert config.preserves_function()


def test_chosen_shards_are_whole_copies() -> None:
    config = UpcycleConfig(num_experts=12, top_k=6, method="virtual-group", granularity=3)
    _, router = build(config, [dense()])
    logits = linear(torch.randn(200, HIDDEN, dtype=torch.float64), router)
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :6].sort(-1).values.view(200, 2, 3)
    assert (chosen[..., 0] % 3 == 0).all() and (chosen - chosen[..., :1] == torch.arange(3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [8, 16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 3, 64, 257])
def test_equal_rows_give_bit_equal_logits(dtype: torch.dtype, experts: int, tokens: int) -> None:
    """What the tie-break rests on: a matmul computes the rows of a copy's shards alike, to the last bit."""
    config = UpcycleConfig(num_experts=experts, top_k=4, method="virtual-group", granularity=4)
    router = make_router(576, config, 0, dtype)
    x = torch.randn(tokens, 576).to(dtype)
    for logits in (linear(x, router), linear(x.float(), router.float())):
        grouped = logits.view(tokens, -1, 4)
        assert (grouped == grouped[..., :1]).all()


def test_down_scale_is_exact_and_cube_root_is_not() -> None:
    ffn, x = dense(), torch.randn(5, HIDDEN, dtype=torch.float64)
    error = {}
    for scaling in ("down", "cube-root", "none"):
        config = UpcycleConfig(num_experts=8, top_k=4, method="virtual-group", granularity=4, scaling=scaling)
        experts, router = build(config, [ffn])
        error[scaling] = ((moe(experts, router, 4, x) - apply(ffn, x)).norm() / apply(ffn, x).norm()).item()
        assert config.preserves_function() == (scaling == "down")
    assert error["down"] < 1e-14
    assert error["none"] == pytest.approx(0.75)
    assert 0.01 < error["cube-root"] < 0.75


def test_unnormalised_gates_are_compensated_on_average() -> None:
    config = UpcycleConfig(num_experts=8, top_k=1, renormalize=False)
    ffn, x = dense(), torch.randn(50, HIDDEN, dtype=torch.float64)
    experts, router = build(config, [ffn])
    assert config.output_scale == 8 and not config.preserves_function()
    out = moe(experts, router, 1, x, renormalize=False)
    assert ((out - apply(ffn, x)).norm() / apply(ffn, x).norm()).item() < 0.5


def test_copy_shares_the_donor_storage() -> None:
    ffn = dense()
    assert make_expert([ffn], UpcycleConfig(), 3, 5).w2.data_ptr() == ffn.w2.data_ptr()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_drop_replaces_whole_units_with_their_statistics(ratio: float) -> None:
    rng = torch.Generator().manual_seed(0)
    big = FFN(
        0.3 + 2 * torch.randn(256, 64, generator=rng),
        torch.randn(256, 64, generator=rng),
        torch.randn(64, 256),
    )
    new = make_expert([big], UpcycleConfig(method="drop", drop_ratio=ratio), 0, 1)
    changed = [(new.w1 != big.w1).all(1), (new.w3 != big.w3).all(1), (new.w2 != big.w2).all(0)]
    assert changed[0].sum() == ratio * 256
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    kept = ~changed[0]
    assert torch.equal(new.w1[kept], big.w1[kept]) and torch.equal(new.w2[:, kept], big.w2[:, kept])
    units = changed[0]
    assert new.w1[units].mean().item() == pytest.approx(big.w1[units].mean().item(), abs=0.1)
    assert new.w1[units].std().item() == pytest.approx(big.w1[units].std().item(), rel=0.05)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_noise_has_the_stated_size(fraction: float) -> None:
    rng = torch.Generator().manual_seed(0)
    big = FFN(*(torch.randn(s, generator=rng) * 0.1 for s in [(256, 64), (256, 64), (64, 256)]))
    new = make_expert([big], UpcycleConfig(method="noise", noise_std=0.05, noise_fraction=fraction), 2, 3)
    for old, made, dim in zip(big, new, (1, 1, 0), strict=True):
        units = (made != old).any(dim)
        assert units.sum() == fraction * 256
        difference = made - old
        assert difference.square().sum().item() == pytest.approx(
            fraction * 256 * 64 * (0.05 * old.std().item()) ** 2, rel=0.05
        )


@pytest.mark.parametrize("method", ["noise", "drop"])
def test_draws_depend_on_seed_layer_and_expert_only(method: str) -> None:
    ffn = dense()

    def made(layer: int, expert: int, seed: int = 0) -> Tensor:
        return make_expert([ffn], UpcycleConfig(method=method, seed=seed), layer, expert).w1

    first = made(1, 2)
    others = [made(1, 3), made(2, 2), made(1, 2, seed=1), made(2, 1)]
    torch.randn(7)
    assert torch.equal(first, made(1, 2))
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["copy", "noise", "drop", "virtual-group"])
def test_keeps_the_stored_type(method: str, dtype: torch.dtype) -> None:
    config = UpcycleConfig(num_experts=4, top_k=2, method=method)
    expert = make_expert([dense(dtype=dtype)], config, 0, 3)
    width = WIDTH // config.shards
    assert [w.shape for w in expert] == [(width, HIDDEN), (width, HIDDEN), (HIDDEN, width)]
    assert all(w.dtype == dtype and torch.isfinite(w).all() for w in expert)


def test_donors_own_contiguous_blocks_of_copies() -> None:
    config = UpcycleConfig(num_experts=8, top_k=2)
    assert [donor_of(e, 4, config) for e in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [donor_of(e, 3, config) for e in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    granular = UpcycleConfig(num_experts=8, top_k=2, method="virtual-group")
    assert [donor_of(e, 2, granular) for e in range(8)] == [0] * 4 + [1] * 4
    donors = [dense(0), dense(1)]
    assert torch.equal(make_expert(donors, config, 0, 4).w1, donors[1].w1)


def test_router_rows() -> None:
    config = UpcycleConfig(num_experts=8, top_k=4, method="virtual-group", granularity=4)
    router = make_router(4096, config, 0, torch.float32)
    assert router.shape == (8, 4096)
    assert torch.equal(router[0], router[3]) and torch.equal(router[4], router[7])
    assert not torch.equal(router[0], router[4])
    assert router.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(router, make_router(4096, config, 1, torch.float32))


def test_generators_differ_by_purpose() -> None:
    keys: list[tuple[str, *tuple[int, ...]]] = [("a", 1, 2), ("b", 1, 2), ("a", 12)]
    draws = [torch.rand(1, generator=generator(0, *key)).item() for key in keys]
    assert len(set(draws)) == 3
