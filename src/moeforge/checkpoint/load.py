"""From a checkpoint to a `Transformer` and back."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moeforge.checkpoint.names import fuse, fused_weight, unfuse
from moeforge.checkpoint.open import open_checkpoint
from moeforge.checkpoint.opened import Checkpoint
from moeforge.checkpoint.source import check_finite
from moeforge.checkpoint.writer import ShardWriter, partial_directory, require_disk_space, require_free_directory
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
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
    opened = checkpoint

    def read(name: str) -> Tensor:
        stored = opened.tensor(name)
        check_finite(f"{opened.path}: {name}", stored)
        return stored.to(dtype or stored.dtype)

    with torch.device("meta"):
        model = Transformer(opened.config, layout)
    with torch.no_grad():
        state = {name: weight.to(device, copy=True) for name, weight in fuse(opened.config, read)}
    model.load_state_dict(state, assign=True)
    return model


class Part(Protocol):
    """A rank's part of a global tensor: seen as `view`, the box at `offset` of `size`, held in `shape`."""

    @property
    def view(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def load_part(
    checkpoint: Checkpoint, parts: Mapping[str, Part], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A rank's part of every weight named in `parts`, by in-memory name, as new tensors.

    Weights are read one at a time, and only those that a part is of: no other stage's, no other rank's experts. Raises
    UserError for weights that are NaN or infinite.
    """

    def read(name: str) -> Tensor:
        stored = checkpoint.tensor(name)
        check_finite(f"{checkpoint.path}: {name}", stored)
        return stored.to(dtype)

    found = {}
    for name, part in parts.items():
        if not math.prod(part.size):
            found[name] = torch.empty(part.shape, dtype=dtype, device=device)
            continue
        view, offset, experts = part.view, part.offset, None
        if ".experts." in name:
            experts = (offset[0], offset[0] + part.size[0])
            view, offset = (part.size[0], *view[1:]), (0, *offset[1:])
        whole = fused_weight(checkpoint.config, name, read, experts).reshape(view)
        box = whole[tuple(slice(begin, begin + length) for begin, length in zip(offset, part.size, strict=True))]
        found[name] = box.reshape(part.shape).to(device, copy=True, memory_format=torch.contiguous_format)
    return found


def save_model(
    model: Transformer,
    directory: str | Path,
    tokenizer_from: Checkpoint | str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model as a Hugging Face directory, in `dtype` (None: as it is), with another's tokenizer.

    The directory appears whole or not at all. Raises UserError if it is in use, RunError if the disk is full.
    """
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
