"""What multiplies each matrix on a text: its inputs, and the largest magnitude among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable

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

Observed = dict[str, list[Tensor]]
"""Inputs [R, K] of the matrices of a unit, by in-memory name: one tensor; `layers.3.ffn.experts.w13` and `.w2` have one
for each expert, of the tokens that chose it."""


def calibrate(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Largest magnitude of the inputs of every matrix, by its in-memory name; those of a layer's experts, of which
    one token meets few, together as `layers.3.ffn.experts.w13` and `.w2`. Arguments and errors are those of `observe`.
    """
    return {
        name: _largest(inputs)
        for observed in observe(checkpoint, batches, dtype, device, progress)
        for name, inputs in observed.items()
    }


@torch.no_grad()
def observe(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Observed, None, None]:
    """The inputs of every matrix, unit by unit in the order of the model, of which one is in memory at a time.

    `progress` is called with (units done, units in all). Raises UserError for weights, RunError for activations, that
    are NaN or infinite.
    """
    model = empty_model(checkpoint)
    passages = []
    for batch in batches:
        sequences, positions = batch.tokens.shape
        context = ForwardContext(DenseAttention(sequences, positions, batch.documents))
        batch = batch.to(device)
        passages.append(Passage(model, batch.tokens.flatten(), batch.positions.flatten(), context, dtype))
    for done, (name, unit) in enumerate(loaded_units(model, checkpoint, dtype, device), 1):
        for module in unit.modules():
            if type(module) in _OBSERVED:
                module.__class__ = _OBSERVED[type(module)]
                setattr(module, "seen", [])  # noqa: B010, as mypy knows no lists of modules
        for passage in passages:
            passage.through(unit)
        observed: Observed = {}
        for path, module in unit.named_modules():
            if isinstance(module, (_ObservedLinear, _ObservedExperts)):
                observed |= {f"{name}.{path}{part}": inputs for part, inputs in module.take().items()}
        for matrix, inputs in observed.items():
            if not math.isfinite(value := _largest(inputs)):
                raise RunError(
                    f"{matrix}: its inputs are {value} on the calibration text; the weights overflow in {dtype}"
                )
        if progress is not None:
            progress(done, len(model.names))
        yield observed


class _ObservedLinear(Linear):
    """A Linear that remembers its inputs."""

    seen: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        return y if self.bias is None else y + self.bias

    def project(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().project(x)

    def take(self) -> Observed:
        """What was seen, and forgets it."""
        inputs, self.seen = torch.cat(self.seen), []
        return {"": [inputs]}


class _ObservedExperts(Experts):
    """Experts that remember the inputs of each, and those of its w2."""

    seen: list[list[tuple[Tensor, Tensor]]]

    def forward(self, x_RD: Tensor, offsets_e: Tensor) -> Tensor:
        ends = offsets_e.tolist()
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        parts = zip(x_RD.split(sizes), self.w13, strict=True)
        self.seen.append([(x, swiglu(F.linear(x, w13))) for x, w13 in parts])
        return super().forward(x_RD, offsets_e)

    def take(self) -> Observed:
        """What was seen, and forgets it."""
        experts, self.seen = [zip(*expert, strict=True) for expert in zip(*self.seen, strict=True)], []
        w13, w2 = zip(*((torch.cat(x), torch.cat(h)) for x, h in experts), strict=True)
        return {".w13": list(w13), ".w2": list(w2)}


_OBSERVED: dict[type, type] = {Linear: _ObservedLinear, Experts: _ObservedExperts}


def _largest(inputs: list[Tensor]) -> float:
    """NaN where there is one."""
    return float(torch.stack([x.abs().amax() if x.numel() else x.new_zeros(()) for x in inputs]).amax())
