from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moeforge.config.model import ModelConfig, RopeConfig
from moeforge.model.rotary import rotary_angles

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, own betas": {
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn, own attention factor": {
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.7,
    },
    "yarn, one frequency apart": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 4.0,
        "beta_slow": 4.0,
    },
}
MAX_POSITIONS = 128


def both(name: str, theta: float, length: int, head_dim: int, base: ModelConfig) -> tuple[ModelConfig, Any]:
    kind, values = name.split(",")[0], KINDS[name]
    rope = RopeConfig(
        theta=theta,
        kind=kind,
        original_max_positions=values.get("original_max_position_embeddings"),
        **{key: value for key, value in values.items() if key != "original_max_position_embeddings"},
    )
    ours = ModelConfig(**(vars(base) | {"rope": rope, "head_dim": head_dim, "max_positions": MAX_POSITIONS}))
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **values},
    )
    return ours, theirs


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("theta, head_dim", [(10000.0, 64), (500000.0, 32), (100.0, 8)])
@pytest.mark.parametrize("length", [40, 300])
def test_frequencies_are_those_of_transformers(
    name: str, theta: float, head_dim: int, length: int, config: Callable[..., ModelConfig]
) -> None:
    ours, theirs = both(name, theta, length, head_dim, config())
    kind = name.split(",")[0]
    if kind == "default":
        inverse, attention = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim), 1.0
    else:
        inverse, attention = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
    positions = torch.arange(length)
    cos, sin = rotary_angles(ours, positions, torch.float64)
    angle = positions.double()[:, None, None] * inverse.double()
    assert cos.shape == sin.shape == (length, 1, head_dim // 2)
    # Frequencies are float32 on both sides: an angle is off by at most a few units in the last place of it.
    torch.testing.assert_close(cos, angle.cos() * attention, rtol=0, atol=1e-6 * length)
    torch.testing.assert_close(sin, angle.sin() * attention, rtol=0, atol=1e-6 * length)
    torch.testing.assert_close(cos[0], torch.full_like(cos[0], attention))


@pytest.mark.parametrize("name", KINDS)
def test_cos_and_sin_are_those_of_transformers(name: str, config: Callable[..., ModelConfig]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours, theirs = both(name, 10000.0, 200, 16, config())
    positions = torch.arange(200)
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = rotary_angles(ours, positions, dtype)
        expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1, dtype=dtype), positions[None])
        for a, b in zip((cos, sin), expected, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a[:, 0], b[0, :, :8], rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-2)


def test_no_tokens(config: Callable[..., ModelConfig]) -> None:
    for name in KINDS:
        ours, _ = both(name, 10000.0, 0, 8, config())
        cos, sin = rotary_angles(ours, torch.zeros(0, dtype=torch.int64), torch.float32)
        assert cos.shape == sin.shape == (0, 1, 4)
