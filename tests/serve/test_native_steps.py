"""Steps in one call of the native library against the same units one after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moeforge.config.model import ModelConfig, MoEConfig, RopeConfig
from moeforge.config.quantization import QuantizationConfig
from moeforge.kernels import native
from moeforge.model import SingleShard, Transformer
from moeforge.serve.native_steps import NativeSteps
from moeforge.serve.step import SequenceStep, StepBatch

from .test_runner import runner_of

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library was not built")

DENSE = ModelConfig(
    vocab_size=70, hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=16, ffn_size=80,
    sliding_window=7, sliding_window_first_layer=1, qkv_bias=True,
)  # fmt: skip
MIXED = replace(
    DENSE,
    num_layers=4,
    qkv_bias=False,
    sliding_window=None,
    moe=MoEConfig(num_experts=5, top_k=2, expert_size=32, gate_norm=0.7, router_bias=True, layer_frequency=2),
)
WIDE = replace(DENSE, head_dim=80, num_heads=2, num_kv_heads=1, tie_embeddings=True)
FP8 = replace(MIXED, quantization=QuantizationConfig("block128", kept=("layers.1.attention.qkv",)))


CHOOSY = replace(
    DENSE,
    rope=RopeConfig(kind="linear", factor=2.0),
    moe=MoEConfig(num_experts=4, top_k=1, expert_size=16, gate_norm=1.0, gate_norm_learned=True, renormalize=False),
)
PLAIN_GATE = replace(CHOOSY, moe=MoEConfig(num_experts=3, top_k=3, expert_size=16, gate_norm=None))


def build(config: ModelConfig) -> Transformer:
    """In bf16, with scales of FP8 weights in float32; norms, biases and gates' scales are random too."""
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.reset_parameters(std=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "router.scale")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def batches() -> list[StepBatch]:
    pages = iter(range(130))
    begins = (0, 1, 3, 15, 16, 40, 41, 63)
    steps = [
        SequenceStep((i + 1,), b, tuple(next(pages) for _ in range(b // 4 + 1)), True) for i, b in enumerate(begins)
    ]
    return [StepBatch(tuple(steps)), StepBatch(tuple(steps[4:5])), StepBatch(tuple(steps[2:6]))]


CONFIGS = {"dense": DENSE, "mixed": MIXED, "wide": WIDE, "fp8": FP8, "choosy": CHOOSY, "plain gate": PLAIN_GATE}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_bits_and_pages_are_those_of_the_units(config: ModelConfig) -> None:
    fused, plain = (runner_of(build(config), 4) for _ in range(2))
    for cache in (fused.cache, plain.cache):
        for i, layer in enumerate(cache.layers):
            layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(i)))
    assert isinstance(fused._steps, NativeSteps)
    plain._steps = None
    for batch in batches():
        assert fused._steps.take(batch)
        ours, theirs = fused.forward(batch), plain.forward(batch)
        assert ours.isfinite().all() and torch.equal(ours, theirs)
    for a, b in zip(fused.cache.layers, plain.cache.layers, strict=True):
        assert torch.equal(a, b)


def test_other_steps_go_through_the_units() -> None:
    runner = runner_of(build(MIXED), 4)
    steps = runner._steps
    assert isinstance(steps, NativeSteps)
    one = SequenceStep((1,), 3, (0,), True)
    assert steps.take(StepBatch((one, one)))
    assert not steps.take(StepBatch(()))
    assert not steps.take(StepBatch((one, SequenceStep((1, 2), 0, (1,), True))))
    assert not steps.take(StepBatch((one, SequenceStep((1,), 0, (1,), False))))


@pytest.mark.parametrize(
    "change", [{"qk_norm": "head"}, {"qk_norm": "full"}, {"head_dim": 8}, {"output_bias": True}, {"hidden_size": 47}]
)
def test_models_that_the_library_does_not_run_whole(change: dict[str, Any]) -> None:
    assert runner_of(build(replace(DENSE, **change)), 4)._steps is None


def test_other_dtypes_pages_ranks_and_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner_of(build(DENSE).float(), 4)._steps is None
    assert runner_of(build(DENSE), 4, fp8=True)._steps is None
    assert runner_of(build(DENSE), 4, deterministic=True)._steps is None
    runner = runner_of(build(DENSE), 4)
    assert NativeSteps.of(runner.model, runner.cache, SingleShard()) is None  # that of training, or of a virtual rank
    monkeypatch.setattr(native, "library", lambda: None)
    assert runner_of(build(DENSE), 4)._steps is None
