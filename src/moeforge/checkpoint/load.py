"""From a checkpoint to a `Transformer` and back."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moeforge.checkpoint.fp8_scales import INPUT_SCALE, WEIGHT_SCALE, memory_scales, row_scales
from moeforge.checkpoint.names import fuse, fused_weight, unfuse
from moeforge.checkpoint.open import open_checkpoint
from moeforge.checkpoint.opened import Checkpoint
from moeforge.checkpoint.source import check_finite
from moeforge.checkpoint.writer import ShardWriter, partial_directory, require_disk_space, require_free_directory
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.kernels.fp8 import E4M3
from moeforge.layout import Layout
from moeforge.model import Transformer


def load_model(
    checkpoint: Checkpoint | str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: Layout | None = None,
) -> Transformer:
    """The whole model in memory, its weights in `dtype` (None: as stored) on `device`.

    Weights are read, converted and moved one at a time, and are the model's own, never views of the file.
    `layout` (of one process) says which units are recomputed in training. Raises UserError for what
    `open_checkpoint` refuses and for weights that are NaN or infinite.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    with torch.device("meta"):
        model = Transformer(checkpoint.config, layout)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = {}
    with torch.no_grad():
        for name, weight in fuse(checkpoint.config, reader(checkpoint, dtype)):
            state[name] = in_memory(name, weight, shapes[name]).to(device, copy=True)
    model.load_state_dict(state, assign=True)
    return model


def reader(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Callable[[str], Tensor]:
    """What `fuse` asks for: weights by canonical name, in `dtype` (None: as stored) unless they are FP8; scales in
    float32, of every row. Raises UserError for NaN or infinite ones."""
    quantization = checkpoint.config.quantization

    def read(name: str) -> Tensor:
        stored = checkpoint.tensor(name)
        check_finite(f"{checkpoint.path}: {name}", stored)
        if quantization is not None and name.endswith(WEIGHT_SCALE):
            rows = checkpoint.shape(name.removesuffix(WEIGHT_SCALE) + ".weight")[0]
            return row_scales(stored, rows, quantization.scales)
        if name.endswith(INPUT_SCALE):
            return stored.float().reshape(())
        return stored if stored.dtype == E4M3 else stored.to(dtype or stored.dtype)

    return read


def in_memory(name: str, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """What `fuse` gives under an in-memory name, as the parameter of this shape is: scales as few rows as it has."""
    return memory_scales(weight, shape[-2]) if name.endswith("scales") else weight


class Part(Protocol):
    """A rank's part of a global tensor: seen as `view`, the box at `offset` of `size`, held in `shape`; in `dtype`, or
    where that is None as the model computes. Of scales, the box holds those of every row, `shape` perhaps fewer."""

    @property
    def view(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype | None: ...


def load_part(
    checkpoint: Checkpoint, parts: Mapping[str, Part], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A rank's part of every weight named in `parts`, by in-memory name, as new tensors.

    Weights are read one at a time, and only those that a part is of: no other stage's, no other rank's experts. Raises
    UserError for weights that are NaN or infinite.
    """
    read = reader(checkpoint, dtype)
    found = {}
    for name, part in parts.items():
        if not math.prod(part.size):
            found[name] = torch.empty(part.shape, dtype=part.dtype or dtype, device=device)
            continue
        view, offset, experts = part.view, part.offset, None
        if ".experts." in name and view:
            experts = (offset[0], offset[0] + part.size[0])
            view, offset = (part.size[0], *view[1:]), (0, *offset[1:])
        whole = fused_weight(checkpoint.config, name, read, experts).reshape(view)
        box = whole[tuple(slice(begin, begin + length) for begin, length in zip(offset, part.size, strict=True))]
        if name.endswith("scales"):
            box = memory_scales(box.reshape(*part.shape[:-2], -1, part.shape[-1]), part.shape[-2])
        found[name] = box.reshape(part.shape).to(device, copy=True, memory_format=torch.contiguous_format)
    return found


def save_model(
    model: Transformer,
    directory: str | Path,
    tokenizer_from: Checkpoint | str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model as a Hugging Face directory, in `dtype` (None: as it is), with another's tokenizer.

    The directory appears whole or not at all. Raises UserError if it is in use or the model has FP8 weights, RunError
    if the disk is full.
    """
    if model.config.quantization is not None:
        raise UserError(f"{directory}: a model with FP8 weights is not written from memory; copy its directory")
    state = model.state_dict()
    width = (dtype or next(iter(state.values())).dtype).itemsize

    def weight(name: str) -> Tensor:
        return state[name].to(dtype or state[name].dtype)

    return write_model(model.config, weight, width, directory, tokenizer_from)


def write_model(
    config: ModelConfig,
    weight: Callable[[str], Tensor],
    width: int,
    directory: str | Path,
    tokenizer_from: Checkpoint | str | Path | None = None,
) -> Path:
    """As `save_model`, of weights that need not be in memory together: `weight` gives that of an in-memory name.

    It is called once a name, in the order of `unfuse`. `width` is about how many bytes an element takes.
    """
    directory = Path(directory)
    require_free_directory(directory)
    require_disk_space(directory, width * config.parameters())
    # Weights of an earlier moment must not be taken for these.
    shutil.rmtree(partial_directory(directory), ignore_errors=True)
    writer = ShardWriter(directory, config, job="write_model")
    try:
        with torch.no_grad():
            for name, tensor in unfuse(config, weight):
                writer.add(name, tensor)
    except UserError:  # of `weight`, which would not give it the next time either
        shutil.rmtree(writer.partial, ignore_errors=True)
        raise
    if tokenizer_from is not None:
        source = tokenizer_from if isinstance(tokenizer_from, Checkpoint) else open_checkpoint(tokenizer_from)
        source.copy_tokenizer(writer.partial)
    return writer.finish()
