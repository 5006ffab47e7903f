"""Where a model is loaded to."""

from __future__ import annotations

import torch

from moeforge.errors import UserError


def pick_device(choice: str, key: str = "device") -> torch.device:
    """The torch device; "auto" is a GPU where there is one. Raises UserError, naming `key`, where it is not there."""
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=choice).device
    except (RuntimeError, AssertionError):
        here = ", cuda" if torch.cuda.is_available() else " (this machine has no CUDA device)"
        raise UserError(f"{key} = {choice!r}: must be auto, cpu{here}") from None
