"""Writing one packed stream, a document at a time."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COPY_TOKENS = 1 << 22


class StreamWriter:
    """Appends documents to tokens.bin, starts.bin and, for chat, loss.bin (packed by `close`)."""

    def __init__(self, directory: Path, dtype: np.dtype[Any], chat: bool) -> None:
        directory.mkdir(parents=True)
        self.directory, self.dtype = directory, dtype
        self.tokens = self.documents = self.loss_tokens = 0
        self._tokens = (directory / "tokens.bin").open("w+b")
        self._starts = (directory / "starts.bin").open("w+b")
        self._loss = (directory / "loss.bytes").open("w+b") if chat else None

    def begin_document(self) -> None:
        self._starts.write(np.int64(self.tokens).tobytes())
        self.documents += 1

    def extend(self, ids: NDArray[Any], loss: NDArray[np.bool_] | None) -> None:
        """Continues the document begun last. ids [n], loss [n] or None."""
        self._tokens.write(ids.astype(self.dtype, copy=False).tobytes())
        if self._loss is not None:
            assert loss is not None
            self._loss.write(loss.tobytes())
        self.tokens += len(ids)
        self.loss_tokens += len(ids) if loss is None else int(loss.sum())

    def last_document(self) -> int:
        """Where the last document starts."""
        self._starts.seek(-8, os.SEEK_END)
        return int(np.frombuffer(self._starts.read(8), np.int64)[0])

    def move_tail(self, begin: int, other: "StreamWriter") -> None:
        """Cuts the tokens from `begin`, in the last document, and appends them to `other` as a document."""
        whole = begin == self.last_document()
        other.begin_document()
        for at in range(begin, self.tokens, _COPY_TOKENS):
            count = min(_COPY_TOKENS, self.tokens - at)
            ids = self._read(self._tokens, at, count, self.dtype)
            loss = None if self._loss is None else self._read(self._loss, at, count, np.dtype(bool))
            other.extend(ids, loss)
            self.loss_tokens -= count if loss is None else int(loss.sum())
        self.tokens = begin
        self.documents -= whole
        self._truncate(self._tokens, begin * self.dtype.itemsize)
        self._truncate(self._starts, self.documents * 8)
        if self._loss is not None:
            self._truncate(self._loss, begin)

    def close(self) -> dict[str, Any]:
        """Brings all of it to disk; returns the counts, and a hash of all files' content, for meta.json."""
        content = hashlib.sha256()
        if self._loss is not None:
            with open(self.directory / "loss.bin", "wb") as packed:
                for at in range(0, self.tokens, _COPY_TOKENS):  # a multiple of 8, so that blocks join
                    block = self._read(self._loss, at, min(_COPY_TOKENS, self.tokens - at), np.dtype(bool))
                    bits = np.packbits(block, bitorder="little").tobytes()
                    packed.write(bits)
                    content.update(bits)
                _sync(packed)
        for file in (self._tokens, self._starts):
            _sync(file)
            file.seek(0)
            content.update(hashlib.file_digest(file, "sha256").digest())
        self.abandon()
        (self.directory / "loss.bytes").unlink(missing_ok=True)
        counts = {"tokens": self.tokens, "documents": self.documents, "loss_tokens": self.loss_tokens}
        return {**counts, "content": content.hexdigest()}

    def abandon(self) -> None:
        for file in (self._tokens, self._starts, self._loss):
            if file is not None:
                with suppress(OSError):  # what a full disk did not take is given up
                    file.close()

    @staticmethod
    def _read(file: Any, at: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        file.seek(at * dtype.itemsize)
        return np.frombuffer(file.read(count * dtype.itemsize), dtype)

    @staticmethod
    def _truncate(file: Any, size: int) -> None:
        file.truncate(size)
        file.seek(size)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
