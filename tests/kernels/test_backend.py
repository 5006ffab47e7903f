from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeforge.kernels import backend
from moeforge.kernels.backend import use_triton

ON_GPU: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)


def test_where_computations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    monkeypatch.setattr(backend, "_INSTALLED", True)
    assert use_triton(ON_GPU)
    assert not use_triton(torch.zeros(1))
    assert not use_triton(SimpleNamespace(is_cuda=True, dtype=torch.float64))  # type: ignore[arg-type]


def test_under_the_interpreter_the_cpu_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    monkeypatch.setattr(backend, "_INSTALLED", True)
    assert use_triton(torch.zeros(1)) and not use_triton(torch.zeros(1, dtype=torch.float64))


def test_without_triton_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INSTALLED", False)
    assert not use_triton(ON_GPU)
