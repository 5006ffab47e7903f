"""A model by its name on the command line, where its weights are not needed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.config.model import ModelConfig


def model_config(model: str) -> ModelConfig:
    """A preset, or the configuration of a checkpoint; a directory with just a config.json will do."""
    from moeforge.config.presets import PRESETS, model_preset
    from moeforge.config.section import expanded

    path = expanded(model)
    if model in PRESETS and not path.exists():
        return model_preset(model)
    file = path / "config.json"
    if file.is_file() and not any(list(path.glob(pattern)) for pattern in ("*.safetensors*", "*.bin*")):
        from moeforge.config.hf import model_config_from_hf

        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error})") from error
        if not isinstance(data, dict):
            raise UserError(f"{file}: must be a JSON object, as Hugging Face's config.json")
        return model_config_from_hf(data)
    if not path.exists() and "/" not in model:  # no hub id either
        return model_preset(model)
    from moeforge.checkpoint import open_checkpoint

    return open_checkpoint(model).config
