"""The names a user gives for a dtype and a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeforge.checkpoint import load_model, open_checkpoint, save_model
from moeforge.checkpoint.inference import load_for_inference, pick_dtype
from moeforge.errors import UserError


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_auto_is_what_is_stored(saved: Path, tmp_path: Path, stored: torch.dtype) -> None:
    checkpoint = open_checkpoint(save_model(load_model(saved, dtype=stored), tmp_path / "out"))
    assert pick_dtype("auto", checkpoint) == stored
    assert load_for_inference(checkpoint, device="cpu").output_weight.dtype == stored


def test_auto_is_bfloat16_where_half_precision_is_stored(saved: Path, tmp_path: Path) -> None:
    half = open_checkpoint(save_model(load_model(saved, dtype=torch.float16), tmp_path / "out"))
    assert pick_dtype("auto", half) == torch.bfloat16


def test_a_dtype_by_name(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    assert [pick_dtype(name, checkpoint) for name in ("fp32", "bf16", "fp64")] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]
    with pytest.raises(UserError, match="dtype = 'int3': must be auto, bf16, fp32 or fp64"):
        pick_dtype("int3", checkpoint)


def test_the_model_is_ready_to_run(saved: Path) -> None:
    model = load_for_inference(open_checkpoint(saved), "bf16", "cpu")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="device = 'toaster'"):
        load_for_inference(open_checkpoint(saved), device="toaster")
