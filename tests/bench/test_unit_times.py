"""Timed units: every kind is there, and what is timed is what training computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from moeforge.bench.unit_times import UnitTimer, mean_time, typical, unit_times
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import unit_names
from moeforge.plan.memory import unit_kind
from moeforge.plan.times import UnitTime

SHAPE = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=7, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
    tie_embeddings=True, moe=MoEConfig(num_experts=4, top_k=2, expert_size=48, layer_frequency=2),
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another make such small work take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure", "fp32", "fp64"])
def test_every_kind_of_unit_is_timed(precision: str) -> None:
    timer = UnitTimer(SHAPE, precision, 2, 8)
    timer.samples(2)
    kinds = timer.kinds()
    assert set(kinds) == {"embed", "attention", "dense ffn", "experts", "head"}
    for kind, time in kinds.items():
        ends = kind in ("embed", "head")
        for name, seconds in dataclasses.asdict(time).items():
            assert seconds > 0 or (ends and name == "recompute") or (kind == "embed" and name == "backward_input")
        assert not (ends and time.recompute)
    # Without a gradient for the tokens, all of the embedding's backward is for its weights.
    assert kinds["embed"].backward_input == 0
    assert kinds["experts"].update / kinds["attention"].update == pytest.approx(
        SHAPE.unit_parameters("layers.1.ffn") / SHAPE.unit_parameters("layers.1.attention")
    )
    assert timer.units() == [kinds[unit_kind(SHAPE, name)] for name in unit_names(SHAPE)]


def test_only_the_kinds_that_the_model_has() -> None:
    dense = replace(SHAPE, moe=None)
    assert len(unit_times(dense, "fp32", 1, 8, repeats=1)) == 2 * SHAPE.num_layers + 2
    timer = UnitTimer(replace(SHAPE, num_layers=1), "fp32", 1, 8)  # its one layer is dense
    timer.samples(1)
    assert set(timer.kinds()) == {"embed", "attention", "dense ffn", "head"}


def test_longer_sequences_take_longer() -> None:
    wide = replace(SHAPE, hidden_size=256, ffn_size=1024, moe=None, num_layers=1)
    short, long = (unit_times(wide, "fp32", 1, positions, repeats=5)[2] for positions in (16, 1024))
    assert long.forward > 2 * short.forward and long.backward > 2 * short.backward


@pytest.mark.parametrize("way", ["split", "recomputed"])
def test_every_way_leaves_the_same_gradients(way: str) -> None:
    timer = UnitTimer(SHAPE, "fp64", 2, 8)

    def gradients(way: str) -> dict[str, torch.Tensor]:
        timer._pass(way)  # type: ignore[arg-type]
        found = {name: weight.grad for name, weight in timer.model.named_parameters()}
        timer.model.zero_grad()
        assert all(grad is not None for grad in found.values())
        return {name: grad for name, grad in found.items() if grad is not None}

    torch.testing.assert_close(gradients(way), gradients("plain"), rtol=1e-9, atol=1e-12)


def test_16_bit_gradients_are_collected_in_every_way() -> None:
    timer = UnitTimer(SHAPE, "bf16", 1, 8)
    for way in ("plain", "split", "recomputed"):
        timer._pass(way)  # type: ignore[arg-type]
        assert all(weight.grad is None for weight in timer.model.parameters())
    assert timer.optimizer.step(1e-9) > 0


def test_processes_meet_before_every_pass() -> None:
    met: list[int] = []
    unit_times(SHAPE, "fp32", 1, 8, repeats=1, meet=lambda: met.append(1))
    assert len(met) == 4 * 3  # three ways and an update; two samples of warm-up


def test_means() -> None:
    assert typical([3.0]) == 3.0
    assert typical([100.0, 1.0, 2.0, 0.0]) == 1.5
    assert mean_time([UnitTime(1.0, 2.0), UnitTime(3.0, 4.0, update=1.0)]) == UnitTime(2.0, 3.0, update=0.5)
