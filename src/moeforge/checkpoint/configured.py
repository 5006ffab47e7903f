"""A model by its name where its weights are not needed."""

from __future__ import annotations

import json

from moeforge.checkpoint.open import open_checkpoint
from moeforge.config.hf import model_config_from_hf
from moeforge.config.model import ModelConfig
from moeforge.config.presets import PRESETS, model_preset
from moeforge.config.section import expanded
from moeforge.errors import UserError


def configured_model(model: str) -> ModelConfig:
    """A preset, or the configuration of a checkpoint; a directory with just a config.json will do."""
    path = expanded(model)
    if model in PRESETS and not path.exists():
        return model_preset(model)
    file = path / "config.json"
    if file.is_file() and not any(list(path.glob(pattern)) for pattern in ("*.safetensors*", "*.bin*")):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error})") from error
        if not isinstance(data, dict):
            raise UserError(f"{file}: must be a JSON object, as Hugging Face's config.json")
        return model_config_from_hf(data)
    if not path.exists() and "/" not in model:  # no hub id either
        return model_preset(model)
    return open_checkpoint(model).config
