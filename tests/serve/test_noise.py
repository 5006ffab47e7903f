"""Numbers that are a function of key and position."""

from __future__ import annotations

import pytest
import torch

from moeforge.serve.noise import request_key, uniform


def test_numbers_are_uniform_and_independent() -> None:
    keys = [request_key(seed) for seed in range(300)]
    numbers = torch.tensor([[uniform(key, at) for at in range(300)] for key in keys], dtype=torch.float64)
    assert (numbers >= 0).all() and (numbers < 1).all()
    counts = torch.bincount((numbers.flatten() * 100).long(), minlength=100)
    assert ((counts - 900) ** 2 / 900).sum() < 170  # chi-square of 99 degrees of freedom
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.001)
    for other in (numbers.roll(1, 0), numbers.roll(1, 1)):
        correlation = torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation.item()) < 0.015


def test_numbers_have_53_bits_and_stay() -> None:
    numbers = [uniform(request_key(7), position) for position in range(100)]
    assert numbers == [uniform(request_key(7), position) for position in range(100)]
    assert all((number * 2**53).is_integer() for number in numbers)
    assert any(number * 2**53 % 2 for number in numbers)
    assert uniform(0, 0) == (0xE220A8397B1DCDAF >> 11) / 2**53  # splitmix64's first number from state 0


def test_keys() -> None:
    keys = {request_key(seed, index) for seed in (0, 1, 2, -1, 2**63, 2**64 - 2) for index in range(50)}
    assert len(keys) == 300 and all(0 <= key < 2**64 for key in keys)
    assert request_key(5, 3) == request_key(5, 3)
    assert request_key(None) != request_key(None)
