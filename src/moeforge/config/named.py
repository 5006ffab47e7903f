"""A model by its name where no weights have to be opened."""

from __future__ import annotations

import json

from moeforge.config.hf import model_config_from_hf
from moeforge.config.model import ModelConfig
from moeforge.config.presets import PRESETS, model_preset
from moeforge.config.section import expanded
from moeforge.errors import UserError


def named_config(model: str) -> ModelConfig | None:
    """A preset, or what a directory with just a config.json describes; None where there are weights to look at.

    Raises UserError for a name that is no preset and nothing else either.
    """
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
    return None
