"""Fixed scales of activations: the largest magnitude that each matrix is given on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.checkpoint import Checkpoint
from moeforge.checkpoint.units import Passage, empty_model, loaded_units
from moeforge.data import Batch
from moeforge.errors import RunError
from moeforge.kernels.swiglu import swiglu
from moeforge.model import DenseAttention, ForwardContext
from moeforge.model.units import Experts, Linear


@torch.inference_mode()
def calibrate(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Largest magnitude of the inputs of every matrix, by its in-memory name; those of a layer's experts, of which
    one token meets few, together as `layers.3.ffn.experts.w13` and `.w2`.

    One unit is in memory at a time. `progress` is called with (units done, units in all). Raises UserError for weights,
    RunError for activations, that are NaN or infinite.
    """
    model = empty_model(checkpoint)
    passages = []
    for batch in batches:
        sequences, positions = batch.tokens.shape
        context = ForwardContext(DenseAttention(sequences, positions, batch.documents))
        batch = batch.to(device)
        passages.append(Passage(model, batch.tokens.flatten(), batch.positions.flatten(), context, dtype))
    largest: dict[str, float] = {}
    for done, (name, unit) in enumerate(loaded_units(model, checkpoint, dtype, device), 1):
        for module in unit.modules():
            if type(module) in _OBSERVED:
                module.__class__ = _OBSERVED[type(module)]
        for passage in passages:
            passage.through(unit)
        for path, module in unit.named_modules():
            if isinstance(module, _ObservedLinear):
                largest[f"{name}.{path}"] = float(module.largest)
            elif isinstance(module, _ObservedExperts):
                largest |= {f"{name}.{path}.w13": float(module.largest), f"{name}.{path}.w2": float(module.inside)}
        if progress is not None:
            progress(done, len(model.names))
    for name, value in largest.items():
        if not math.isfinite(value):
            raise RunError(f"{name}: its inputs are {value} on the calibration text; the weights overflow in {dtype}")
    return largest


class _ObservedLinear(Linear):
    """A Linear that remembers the largest magnitude of its inputs."""

    largest: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.largest = _larger(self.largest, x)
        return super().forward(x)

    def project(self, x: Tensor) -> Tensor:
        self.largest = _larger(self.largest, x)
        return super().project(x)


class _ObservedExperts(Experts):
    """Experts that remember the largest magnitude of their inputs, and of those of their w2."""

    largest: Tensor | float = 0.0
    inside: Tensor | float = 0.0

    def forward(self, x_RD: Tensor, offsets_e: Tensor) -> Tensor:
        self.largest = _larger(self.largest, x_RD)
        begin = 0
        for w13, end in zip(self.w13, offsets_e.tolist(), strict=True):
            self.inside = _larger(self.inside, swiglu(F.linear(x_RD[begin:end], w13)))
            begin = end
        return super().forward(x_RD, offsets_e)


_OBSERVED: dict[type, type] = {Linear: _ObservedLinear, Experts: _ObservedExperts}


def _larger(so_far: Tensor | float, x: Tensor) -> Tensor | float:
    """NaN stays NaN."""
    return torch.maximum(x.abs().amax().float(), torch.as_tensor(so_far, device=x.device)) if x.numel() else so_far
