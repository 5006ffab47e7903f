"""`Checkpoint`: an opened model on disk under canonical names, whatever its format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeforge.checkpoint.families import canonical_name
from moeforge.checkpoint.fp8_scales import INPUT_SCALE, WEIGHT_SCALE, check_scales
from moeforge.checkpoint.names import canonical_shapes
from moeforge.checkpoint.source import Shape, WeightSource
from moeforge.checkpoint.tokenizer import load_tokenizer, save_tokenizer, tokenizer_files
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError


class Checkpoint:
    """A model on disk: its configuration, its weights read one at a time, its tokenizer.

    `path` is the directory or the GGUF file. Raises UserError unless the weights are exactly those that the
    configuration asks for.
    """

    def __init__(self, path: Path, config: ModelConfig, source: WeightSource) -> None:
        self.path = path
        self.config = config
        self._source = source
        self._on_disk: dict[str, str] = {}
        for disk in source.names:
            if (canonical := canonical_name(disk)) and (other := self._on_disk.setdefault(canonical, disk)) != disk:
                raise UserError(f"{path}: {other} and {disk} are the same tensor by two names; must be there once")
        if config.tie_embeddings:
            self._on_disk.pop("lm_head.weight", None)
        if config.quantization is not None and config.quantization.activations != "static":
            # Some files carry scales of inputs that their own configuration does not use.
            self._on_disk = {name: disk for name, disk in self._on_disk.items() if not name.endswith(INPUT_SCALE)}
        self._check_counts()
        self._shapes = canonical_shapes(config)
        self._check()
        self.names = tuple(self._shapes)

    def _check_counts(self) -> None:
        layers, experts = self.config.num_layers, self.config.moe.num_experts if self.config.moe else 0
        if max(layers, experts) > len(self._on_disk):  # before `canonical_shapes` makes so many names
            raise UserError(
                f"{self.path}: config.json asks for {layers} layers and {experts} experts, but the files hold only "
                f"{len(self._on_disk)} tensors; half-downloaded, or config.json belongs to other weights"
            )

    def _check(self) -> None:
        expected, quantization = self._shapes, self.config.quantization
        blocks = quantization is not None and quantization.scales == "block128"
        for what, names in (
            ("missing", [name for name in expected if name not in self._on_disk]),
            ("not part of this model", [name for name in self._on_disk if name not in expected]),
        ):
            if names:
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                hint = "; half-downloaded, or config.json belongs to other weights" if what == "missing" else ""
                raise UserError(f"{self.path}: {len(names)} tensors {what}: {shown}{hint}")
        for name, shape in expected.items():
            stored = self._source.shape(self._on_disk[name])
            is_scale = name.endswith((WEIGHT_SCALE, INPUT_SCALE))
            # One number is a scale of a tensor however it is shaped, N numbers are those of N rows.
            if stored != shape and not (is_scale and not blocks and _not_one(stored) == _not_one(shape)):
                raise UserError(f"{self.path}: {name} has shape {stored}; config.json asks for {shape}")
            if is_scale and not self.dtype(name).is_floating_point:
                raise UserError(f"{self.path}: {name} is {self.dtype(name)}; scales must be floating point")
            wanted = name.removesuffix(".weight") + WEIGHT_SCALE in expected
            if (self.dtype(name) == torch.float8_e4m3fn) != wanted:
                what = "float8_e4m3fn, as it has a scale" if wanted else "another, as it has no scale"
                raise UserError(f"{self.path}: {name} is {self.dtype(name)}; its dtype must be {what}")

    def shape(self, name: str) -> Shape:
        """Shape of a canonical name, without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which `tensor` gives a canonical name."""
        return self._source.dtype(self._on_disk[name])

    def tensor(self, name: str) -> Tensor:
        """The weight as stored (GGUF: dequantised to float32), on the CPU; a read-only memory map.

        Raises UserError for scales that are not finite and positive.
        """
        stored = self._source.tensor(self._on_disk[name]).reshape(self._shapes[name])
        if name.endswith((WEIGHT_SCALE, INPUT_SCALE)):
            check_scales(f"{self.path}: {name}", stored)
        return stored

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's own files; empty where it is inside the GGUF file."""
        return tokenizer_files(self.path)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is something that `tokenizer` may load."""
        return self.path.is_file() or bool(self.tokenizer_files)

    def tokenizer(self) -> Any:
        """The tokenizer, as transformers loads it.

        Raises UserError if there is none, or if it gives ids for which the embedding has no row.
        """
        tokenizer = load_tokenizer(self.path)
        check_tokenizer(tokenizer, self)
        return tokenizer

    def copy_tokenizer(self, directory: str | Path) -> None:
        """Give a model directory this tokenizer: its files as they are, or those made from GGUF metadata.

        Raises UserError as `tokenizer` does, where it has to be loaded for that (GGUF).
        """
        if self.path.is_file():
            save_tokenizer(self.tokenizer(), Path(directory))
        for file in self.tokenizer_files:
            shutil.copyfile(file, Path(directory) / file.name)


def _not_one(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def check_tokenizer(tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Raise UserError if a tokenizer gives ids for which the embedding has no row.

    The highest id decides: added tokens may leave gaps, so that there are fewer tokens than ids.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= checkpoint.config.vocab_size:
        raise UserError(
            f"{checkpoint.path}: the tokenizer gives ids up to {highest} but the embedding has only "
            f"{checkpoint.config.vocab_size} rows (vocab_size); use the tokenizer of these weights"
        )
