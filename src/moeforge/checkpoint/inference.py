"""From the names a user gives (a dtype, a device) to a model that is ready to generate or to be evaluated."""

from __future__ import annotations

import torch

from moeforge.checkpoint.device import pick_device
from moeforge.checkpoint.load import load_model
from moeforge.checkpoint.names import EMBED
from moeforge.checkpoint.opened import Checkpoint
from moeforge.errors import UserError
from moeforge.model import Transformer

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def pick_dtype(dtype: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype to compute in; "auto" is the stored one, and bfloat16 for quantised files.

    Raises UserError for an unknown name.
    """
    if dtype != "auto":
        return named_dtype(dtype)
    quantised = checkpoint.path.suffix == ".gguf"
    stored = checkpoint.dtype(EMBED)
    return stored if stored in _DTYPES.values() and not quantised else torch.bfloat16


def named_dtype(dtype: str) -> torch.dtype:
    """The dtype to compute in where nothing is stored: "auto" is bfloat16. Raises UserError for an unknown name."""
    if dtype == "auto":
        return torch.bfloat16
    if dtype not in _DTYPES:
        raise UserError(f"dtype = {dtype!r}: must be auto, bf16, fp32 or fp64")
    return _DTYPES[dtype]


def load_for_inference(checkpoint: Checkpoint, dtype: str = "auto", device: str = "auto") -> Transformer:
    """The checkpoint's model, in evaluation mode. Raises UserError for what cannot be loaded."""
    chosen = pick_dtype(dtype, checkpoint)
    return load_model(checkpoint, chosen, pick_device(device)).eval().requires_grad_(False)
