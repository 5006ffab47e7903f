"""A training checkpoint as a model that others can open."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moeforge.checkpoint import Checkpoint, open_checkpoint, write_model
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.model import Transformer
from moeforge.train.dcp import SavedState
from moeforge.train.optimizer import MODEL_DTYPE
from moeforge.train.state import TrainerState, load_trainer_state


def export_checkpoint(
    checkpoint: Path, directory: Path, tokenizer_from: str | None = None
) -> tuple[ModelConfig, torch.dtype]:
    """Write a training checkpoint of any layout as a Hugging Face directory, in the run's precision.

    Weights are read and written one at a time. The tokenizer is that of `tokenizer_from`, or of the model that the run
    began with. Returns the model's configuration and the dtype written. Raises UserError for what is no complete
    checkpoint and for an output directory in use, RunError where the disk is full.
    """
    state = load_trainer_state(checkpoint)
    try:
        config, dtype = ModelConfig.from_dict(state.model), MODEL_DTYPE[state.config["model"]["precision"]]
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / 'trainer.json'}: damaged ({error}); use another checkpoint") from error
    tokenizer = _tokenizer(state, checkpoint, tokenizer_from)
    saved = SavedState(checkpoint)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Transformer(config).state_dict().items()}

    def weight(name: str) -> Tensor:
        return saved.tensor(f"weight.{name}").view(shapes[name]).to(dtype)

    write_model(config, weight, dtype.itemsize, directory, tokenizer)
    return config, dtype


def _tokenizer(state: TrainerState, checkpoint: Path, choice: str | None) -> Checkpoint:
    if choice is not None:
        return open_checkpoint(choice)
    try:
        return open_checkpoint(state.config["model"]["path"])
    except UserError as error:
        raise UserError(
            f"{checkpoint}: the run's model, for its tokenizer: {error}; or give --tokenizer-from"
        ) from error
