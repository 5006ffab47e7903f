"""From what a user names (a directory, a GGUF file, a hub id, a preset) to an opened `Checkpoint`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch

from moeforge.checkpoint.bin_source import BinSource
from moeforge.checkpoint.names import EMBED, HEAD
from moeforge.checkpoint.opened import Checkpoint
from moeforge.checkpoint.safetensors_source import SafetensorsSource
from moeforge.checkpoint.source import WeightSource, first_line, incomplete
from moeforge.config.hf import model_config_from_hf
from moeforge.config.model import ModelConfig
from moeforge.config.presets import HUB_IDS
from moeforge.errors import UserError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_METADATA = ["*.json", "*.model", "*.txt", "*.jinja"]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model without reading its weights: a directory, a .gguf file, a hub id, or a preset's name.

    Raises UserError where nothing is there, files are missing or cut short, or the weights are not those that
    the configuration describes.
    """
    if not str(model).strip():
        raise UserError("model = '': must name a directory, a .gguf file, a hub id or a preset")
    path = Path(model).expanduser()
    if path.is_file():
        return _open_gguf(path)
    if path.is_dir():
        return _open_directory(path)
    hub_id = HUB_IDS.get(str(model), str(model))
    if not _HUB_ID.match(hub_id):
        raise UserError(f"model = {str(model)!r}: no such directory or file; presets are {', '.join(HUB_IDS)}")
    return _open_directory(_download(hub_id))


def _open_directory(path: Path) -> Checkpoint:
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file():
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0])
        if (path / "trainer.json").is_file():
            raise UserError(
                f"{path}: a training checkpoint; `moeforge export {path} OUT` makes a model directory of it"
            )
        raise UserError(f"{path}: no config.json: not a Hugging Face model directory, or half-downloaded")
    hf = _read_json(path / "config.json")
    source = _directory_source(path)
    config = model_config_from_hf(hf, source.names)
    if config.tie_embeddings and HEAD in source.names:
        # transformers ties only what is equal; torch archives always hold both names.
        tied = torch.equal(source.tensor(HEAD), source.tensor(EMBED))
        config = dataclasses.replace(config, tie_embeddings=tied)
    return Checkpoint(path, _with_generation_ends(path, config), source)


def _directory_source(path: Path) -> WeightSource:
    for source, single in ((SafetensorsSource, "model.safetensors"), (BinSource, "pytorch_model.bin")):
        if (path / single).is_file() or (path / f"{single}.index.json").is_file():
            return source(path)
    raise incomplete(path, "no weights there (model.safetensors, pytorch_model.bin, or an index of shards)")


def _with_generation_ends(path: Path, config: ModelConfig) -> ModelConfig:
    """Chat models often list further end tokens in generation_config.json only."""
    file = path / "generation_config.json"
    ends = _read_json(file).get("eos_token_id") if file.is_file() else None
    more = ends if isinstance(ends, list) else [ends] if ends is not None else []
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise incomplete(path, f"is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object")
    return data


def _open_gguf(path: Path) -> Checkpoint:
    if path.suffix != ".gguf":
        raise UserError(f"{path}: neither a directory nor a .gguf file")
    from moeforge.checkpoint.gguf_source import GGUFSource

    source = GGUFSource(path)
    return Checkpoint(path, source.config, source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = [file.rfilename for file in HfApi().model_info(hub_id, timeout=10).siblings or ()]
        safe = any(file.endswith(".safetensors") for file in files)
        weights = "*.safetensors" if safe else "pytorch_model*.bin"
        return Path(snapshot_download(hub_id, allow_patterns=[*_HUB_METADATA, weights]))
    except HfHubHTTPError as error:
        raise UserError(
            f"model = {hub_id!r}: no such directory here, and the hub answers: {first_line(error)}"
        ) from None
    except Exception as error:  # each HTTP library has its own kinds of "cannot be reached"
        return _from_cache(hub_id, first_line(error))


def _from_cache(hub_id: str, reason: str) -> Path:
    """A snapshot downloaded earlier serves when the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        raise UserError(
            f"model = {hub_id!r}: no such directory here, not in the local cache, and the hub cannot be "
            f"reached ({reason}); give a directory or a .gguf file"
        ) from None
