"""Small models of every shape that a layout can meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from moeforge.config.model import ModelConfig, MoEConfig


def make_model(
    layers: int = 3, kv_heads: int = 3, ffn: int = 200, vocab: int = 101, moe: MoEConfig | None = None
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, hidden_size=24, num_layers=layers, num_heads=kv_heads * 2, num_kv_heads=kv_heads,
        head_dim=4, ffn_size=ffn, moe=moe,
    )  # fmt: skip


@pytest.fixture(scope="session")
def model() -> Callable[..., ModelConfig]:
    return make_model


@pytest.fixture(scope="session")
def mixed() -> ModelConfig:
    """Four layers, the second and the fourth with 5 experts of 48 columns."""
    return make_model(layers=4, moe=MoEConfig(num_experts=5, top_k=2, expert_size=48, layer_frequency=2))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[ModelConfig, dict]:
    pp, dp, tp = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    ep = draw(st.sampled_from([n for n in range(1, dp * tp + 1) if dp * tp % n == 0]))
    etp = draw(st.sampled_from([n for n in range(1, dp * tp + 1) if dp * tp % (ep * n) == 0]))
    schedule, chunks = draw(
        st.sampled_from([("1f1b", 1), ("interleaved-1f1b", 3), ("zero-bubble", 1), ("zero-bubble", 2), ("zbv", 2)])
    )
    frequency = draw(st.integers(0, 2))
    experts, width = draw(st.integers(2, 9)), draw(st.integers(1, 99))
    config = make_model(
        pp * chunks + draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 400)),
        draw(st.integers(1, 99)), MoEConfig(experts, 2, width, layer_frequency=frequency) if frequency else None,
    )  # fmt: skip
    positive = st.lists(st.integers(0, 80), min_size=tp, max_size=tp).filter(any)
    weights = draw(st.none() | positive)
    halves = [0.0] * (pp * chunks)
    for _ in range(2 * config.num_layers):
        halves[draw(st.integers(0, pp * chunks - 1))] += 0.5
    stages = draw(st.none() | st.just(halves))
    recompute = draw(st.sampled_from(["none", "all", "ffn", "attention"]))
    sizes = {"pp": pp, "dp": dp, "tp": tp, "ep": ep, "etp": etp, "schedule": schedule, "chunks": chunks}
    return config, sizes | {"weights": weights, "stages": stages, "recompute": recompute}


@pytest.fixture(scope="session")
def cases() -> st.SearchStrategy[tuple[ModelConfig, dict]]:
    """Models, and arguments of `build_layout` that fit them."""
    return _cases()
