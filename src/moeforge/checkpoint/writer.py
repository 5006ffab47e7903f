"""Writing a model directory weight by weight: safetensors shards, index, config.json; resumable after a kill.

Everything is written in `.NAME.partial` beside the output directory, which appears whole, by one rename, in
`finish`. No weight is buffered: a shard's header is given room for every name of the model (safetensors
allows trailing spaces), weights are appended behind it, and the header is filled in when the shard closes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moeforge.checkpoint.families import disk_name
from moeforge.checkpoint.fp8_scales import WEIGHT_SCALE
from moeforge.checkpoint.names import EMBED, HEAD, canonical_shapes
from moeforge.config.hf import model_config_to_hf, on_disk_form
from moeforge.config.model import ModelConfig
from moeforge.errors import RunError, UserError, no_room

SHARD_BYTES = 5_000_000_000
_JOURNAL = "journal.jsonl"
_TAGS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class ShardWriter:
    """Streams a model into `directory`, which must not exist or be empty.

    Takes each canonical name of `config` exactly once, in any order, and holds no weight in memory. A writer
    opened on the remains of a killed one with the same `config` and `job` (a description of what is being
    made; other remains are thrown away) goes on: `done` are the names already safe, not to be added again.
    Raises UserError for a directory in use, RunError where the disk is full.
    """

    def __init__(
        self, directory: str | Path, config: ModelConfig, shard_bytes: int = SHARD_BYTES, job: str = ""
    ) -> None:
        self.directory = Path(directory)
        require_free_directory(self.directory)
        self.config = config
        self.partial = partial_directory(self.directory)
        self._shapes = canonical_shapes(config)
        self._blocks = config.quantization is not None and config.quantization.scales == "block128"
        self._form = on_disk_form(config)
        self._shard_bytes = shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._header: dict[str, Any] = {}
        self._names: dict[str, None] = {}
        self._done: set[str] = set()
        self._file: BinaryIO | None = None
        self._offset = 0
        self._dtype = ""
        self._resume({"config": config.fingerprint(), "job": job})

    @property
    def done(self) -> set[str]:
        """Canonical names that are in closed shards by now."""
        return set(self._done)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one weight. Raises ValueError for a name or shape that is not the model's."""
        if self._shapes.get(name) != tuple(tensor.shape):
            raise ValueError(f"{name} {tuple(tensor.shape)}: the model has {self._shapes.get(name)}")
        if name in self._names or name in self._done:
            raise ValueError(f"{name}: written twice")
        size = tensor.numel() * tensor.element_size()
        if self._names and self._offset + size > self._shard_bytes:
            self._close_shard()
        if not self._dtype:
            self._dtype = str(tensor.dtype).removeprefix("torch.")
        with self._disk_faults():
            if self._file is None:
                self._file = (self.partial / "shard.tmp").open("wb")
                self._file.seek(self._header_bytes())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._file.write(data.numpy().data)
        self._header[self._disk_name(name)] = {
            "dtype": _TAGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, self._offset + size],
        }
        self._names[name] = None
        self._offset += size

    def finish(self) -> Path:
        """Close the last shard, write index and config.json, and let the directory appear. Returns it."""
        if self._names:
            self._close_shard()
        if missing := [name for name in self._shapes if name not in self._done]:
            raise ValueError(f"{len(missing)} weights were never added, the first is {missing[0]}")
        with self._disk_faults():
            weight_map: dict[str, str] = {}
            for i, shard in enumerate(self._shards):
                single = len(self._shards) == 1
                final = "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
                if (self.partial / shard["file"]).exists():  # not yet renamed by a killed finish
                    (self.partial / shard["file"]).rename(self.partial / final)
                weight_map.update({self._disk_name(name): final for name in shard["names"]})
            if len(self._shards) > 1:
                total = sum(shard["bytes"] for shard in self._shards)
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                write_json(self.partial / "model.safetensors.index.json", index)
            data = model_config_to_hf(self.config, self._shards[0]["dtype"], self._unquantized())
            write_json(self.partial / "config.json", data)
            if self.directory.is_dir():
                self.directory.rmdir()
            self.partial.rename(self.directory)
            (self.directory / _JOURNAL).unlink()
        return self.directory

    def _disk_name(self, name: str) -> str:
        return disk_name(name, self._form, self._blocks)

    def _unquantized(self) -> list[str]:
        """The matrices but the embedding that have no scales, as modules on disk; the head even where it is tied."""
        plain = (name for name, shape in self._shapes.items() if len(shape) == 2 and name.endswith(".weight"))
        names = [name for name in plain if name not in (EMBED, HEAD)]
        ours = [name for name in names if name.removesuffix(".weight") + WEIGHT_SCALE not in self._shapes]
        return [self._disk_name(name).removesuffix(".weight") for name in (HEAD, *ours)]

    def _header_bytes(self) -> int:
        """Room for a header with every name of the model, in whole pages so that weights stay aligned."""
        names = sum(len(self._disk_name(name)) + 160 for name in self._shapes)
        return -(-(names + 64) // 4096) * 4096

    def _close_shard(self) -> None:
        assert self._file is not None
        room = self._header_bytes() - 8
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        with self._disk_faults():
            self._file.seek(0)
            self._file.write(room.to_bytes(8, "little") + header.ljust(room))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            name = f"shard-{len(self._shards) + 1:05d}.safetensors"
            (self.partial / "shard.tmp").rename(self.partial / name)
            shard = {"file": name, "bytes": self._offset, "dtype": self._dtype, "names": list(self._names)}
            self._append_journal(shard)
        self._shards.append(shard)
        self._done.update(self._names)
        self._file, self._header, self._names, self._offset = None, {}, {}, 0

    def _append_journal(self, entry: dict[str, Any]) -> None:
        with (self.partial / _JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _resume(self, identity: dict[str, str]) -> None:
        journal = self.partial / _JOURNAL
        entries = _read_journal(journal)
        if entries and entries[0] == identity:
            with self._disk_faults():  # what is appended must not join a line that a kill cut short
                os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
            self._shards = entries[1:]
            self._done = {name for shard in self._shards for name in shard["names"]}
            self._dtype = self._shards[0]["dtype"] if self._shards else ""
            return
        with self._disk_faults():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            self._append_journal(identity)

    @contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not (full := no_room(error)):
                raise
            raise RunError(
                f"{self.directory}: the disk is full ({full}); {len(self._done)} of "
                f"{len(self._shapes)} weights are saved in {self.partial}: free space and run again to go on"
            ) from None


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """Its whole lines; a kill may have cut the last one short, and that shard is then written again."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        entries.append(json.loads(line))
    return entries


def write_json(path: Path, data: dict[str, Any]) -> None:
    """As Hugging Face writes it: two spaces, a last newline."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def partial_directory(directory: Path) -> Path:
    """Where a `ShardWriter` of this directory works until it finishes."""
    return directory.parent / f".{directory.name}.partial"


def interrupted_job(directory: Path) -> str | None:
    """The `job` of a killed `ShardWriter` of this directory, None where there is none to go on with."""
    entries = _read_journal(partial_directory(directory) / _JOURNAL)
    return str(entries[0]["job"]) if entries else None


def require_free_directory(directory: Path) -> None:
    """Raise UserError unless the directory can be written, and nothing is lost by writing there."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory}: already exists and is not empty; name another directory or remove it")
    place = nearest_existing(directory.absolute().parent)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"{directory}: {place} is not a directory in which files can be written")


def nearest_existing(place: Path) -> Path:
    """`place`, or the lowest of its parents that is there."""
    while not place.exists():
        place = place.parent
    return place


def require_disk_space(directory: str | Path, needed_bytes: int) -> None:
    """Raise RunError naming both figures if the disk of `directory` (which may not exist) has less space."""
    available = shutil.disk_usage(nearest_existing(Path(directory).absolute())).free
    if available < needed_bytes:
        raise RunError(
            f"{directory}: needs {needed_bytes / 1e9:.1f} GB of disk, {available / 1e9:.1f} GB are "
            "available; nothing was written"
        )
