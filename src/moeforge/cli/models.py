"""A model by its name on the command line, where its weights are not needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeforge.config.model import ModelConfig


def model_config(model: str) -> ModelConfig:
    """A preset, or the configuration of a checkpoint; a directory with just a config.json will do."""
    from moeforge.config.named import named_config

    if (found := named_config(model)) is not None:
        return found
    from moeforge.checkpoint import open_checkpoint

    return open_checkpoint(model).config
