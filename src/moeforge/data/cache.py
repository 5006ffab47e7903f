"""The token cache: packed streams of tokens on disk, memory-mapped.

<cache_dir>/<fingerprint>/meta.json                     tokenizer, EOS, dtype, source, counts, content hashes
<cache_dir>/<fingerprint>/{train,held_out}/tokens.bin   uint16 (vocabulary < 65536) or uint32
                                           starts.bin   int64, first token of each document
                                           loss.bin     chat only: a bit per token, lowest bit first
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeforge.errors import UserError

VERSION = 2
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class TokenStream:
    """One packed stream: tokens [N], starts [documents], loss [ceil(N / 8)] or None if all tokens count."""

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    loss: NDArray[np.uint8] | None

    def __len__(self) -> int:
        return len(self.tokens)

    def loss_at(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the tokens at `index` carry loss, in the shape of `index`."""
        if self.loss is None:
            return np.ones(index.shape, bool)
        return (self.loss[index >> 3] >> (index & 7).astype(np.uint8) & 1).astype(bool)


@dataclass(frozen=True)
class TokenCache:
    """One tokenised source: its stream for training, the stream held out, and its weight in a mixture."""

    directory: Path
    meta: dict[str, Any]
    train: TokenStream
    held_out: TokenStream
    weight: float = 1.0

    @classmethod
    def open(cls, directory: str | Path, weight: float = 1.0) -> "TokenCache":
        """Maps a finished cache. Raises UserError if there is none, or if files are missing or cut short."""
        directory = Path(directory)
        try:
            meta = json.loads((directory / "meta.json").read_text())
            if meta["version"] != VERSION:
                raise ValueError(f"version {meta['version']}, expected {VERSION}")
            streams = {split: _open_stream(directory / split, meta, split) for split in SPLITS}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"token cache {str(directory)!r}: missing or damaged ({error}); delete it and it is built anew"
            ) from error
        return cls(directory, meta, **streams, weight=weight)

    @property
    def label(self) -> str:
        return str(self.meta["source"]["path"])

    @property
    def eos_id(self) -> int:
        return int(self.meta["eos_id"])


def _open_stream(directory: Path, meta: dict[str, Any], split: str) -> TokenStream:
    counts = meta["splits"][split]
    tokens = _map(directory / "tokens.bin", np.dtype(meta["dtype"]), counts["tokens"])
    starts = _map(directory / "starts.bin", np.dtype(np.int64), counts["documents"])
    loss = None
    if meta["chat"]:
        loss = _map(directory / "loss.bin", np.dtype(np.uint8), -(-counts["tokens"] // 8))
    return TokenStream(tokens, starts, loss)


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    held = path.stat().st_size
    if held != count * dtype.itemsize:
        raise ValueError(f"{path.name} holds {held} bytes, expected {count * dtype.itemsize}")
    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", shape=(count,))
