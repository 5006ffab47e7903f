"""From a checkpoint to a `Transformer` and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from moeforge.checkpoint.names import fuse, unfuse
from moeforge.checkpoint.open import open_checkpoint
from moeforge.checkpoint.opened import Checkpoint
from moeforge.checkpoint.source import check_finite
from moeforge.checkpoint.writer import ShardWriter, partial_directory, require_disk_space, require_free_directory
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


def save_model(
    model: Transformer,
    directory: str | Path,
    tokenizer_from: Checkpoint | str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model as a Hugging Face directory, in `dtype` (None: as it is), with another's tokenizer.

    The directory appears whole or not at all. Raises UserError if it is in use, RunError if the disk is full.
    """
    directory = Path(directory)
    require_free_directory(directory)
    state = model.state_dict()
    width = (dtype or next(iter(state.values())).dtype).itemsize
    require_disk_space(directory, width * model.config.parameters())
    # Weights of an earlier moment must not be taken for these.
    shutil.rmtree(partial_directory(directory), ignore_errors=True)
    writer = ShardWriter(directory, model.config, job="save_model")
    with torch.no_grad():
        for name, weight in unfuse(model.config, state.__getitem__):
            writer.add(name, weight.to(dtype or weight.dtype))
    if tokenizer_from is not None:
        source = tokenizer_from if isinstance(tokenizer_from, Checkpoint) else open_checkpoint(tokenizer_from)
        source.copy_tokenizer(writer.partial)
    return writer.finish()
