"""Noise that is a function of key, position and token."""

from __future__ import annotations

import pytest
import torch

from moeforge.serve.noise import exponential_noise, request_key


def test_noise_is_exponential_and_independent() -> None:
    tokens = torch.arange(2000)
    noise = exponential_noise(torch.arange(200), torch.full((200,), 3), tokens)
    assert noise.dtype == torch.float32 and (noise > 0).all()
    assert noise.mean().item() == pytest.approx(1, abs=0.01)
    assert noise.var().item() == pytest.approx(1, abs=0.02)
    levels = torch.tensor([1e-4, 0.01, 0.1, 0.5, 2.0])
    shares = (noise.flatten()[:, None] < levels).double().mean(0)
    torch.testing.assert_close(shares, 1 - torch.exp(-levels.double()), rtol=0.35, atol=2e-3)
    for other in (
        noise.roll(1, 0),
        noise.roll(1, 1),
        exponential_noise(torch.arange(200), torch.full((200,), 4), tokens),
    ):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation.item()) < 0.01


def test_some_tokens_alone_have_the_same_noise() -> None:
    keys, positions = torch.arange(3), torch.tensor([7, 1, 7])
    noise = exponential_noise(keys, positions, torch.arange(50))
    some = torch.tensor([[3, 1], [0, 49], [20, 20]])
    assert torch.equal(exponential_noise(keys, positions, some), noise.gather(1, some))
    assert torch.equal(exponential_noise(keys[1:2], positions[1:2], torch.arange(50)), noise[1:2])


def test_keys() -> None:
    keys = {request_key(seed, index) for seed in (0, 1, 2, -1, 2**63, 2**64 - 2) for index in range(50)}
    assert len(keys) == 300 and all(-(2**63) <= key < 2**63 for key in keys)
    assert request_key(5, 3) == request_key(5, 3)
    assert request_key(None) != request_key(None)
