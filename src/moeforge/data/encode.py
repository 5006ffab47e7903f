"""Documents to token ids, in batches, with a fast tokenizer of transformers."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeforge.data.chat import encode_chats
from moeforge.data.reading import Piece
from moeforge.errors import UserError

_BATCH_PIECES = 1024
_BATCH_CHARACTERS = 1 << 20

Mask = NDArray[np.bool_] | None


class Encoder:
    """Turns pieces into arrays of ids; BOS where the tokenizer puts it by itself, EOS after each text.

    A conversation is exactly what the chat template writes: nothing is added. Raises UserError: the tokenizer
    is slow or has no EOS.
    """

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.name = str(tokenizer.name_or_path)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"tokenizer {self.name!r}: a fast tokenizer (tokenizer.json) is needed")
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {self.name!r}: has no EOS token (eos_token) to end documents with")
        self.eos_id = int(tokenizer.eos_token_id)
        probe = tokenizer("a")["input_ids"]
        self.bos_id = tokenizer.bos_token_id if probe and probe[0] == tokenizer.bos_token_id else None
        # The highest id decides: added tokens may leave gaps, so that there are fewer tokens than ids.
        self.dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 65536 else np.uint32)

    def fingerprint(self) -> str:
        """Hash of all that decides the ids of plain text: vocabulary, normaliser, special tokens."""
        pipeline = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for of_the_last_call in ("padding", "truncation"):
            pipeline.pop(of_the_last_call, None)
        parts = [pipeline, self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode(self, pieces: Iterable[Piece]) -> Iterator[tuple[NDArray[Any], Mask, bool]]:
        """(ids, loss mask or None, does this end the document) for every piece, in order."""
        fresh = True
        for batch in _batches(pieces):
            for piece, (ids, loss) in zip(batch, self._encode_batch(batch), strict=True):
                if not self.chat and ids:
                    if fresh and self.bos_id is not None and ids[0] != self.bos_id:
                        ids.insert(0, self.bos_id)
                    fresh = False
                if not self.chat and piece.last:
                    # A document that says nothing stays empty and is left out.
                    if not fresh and (not ids or ids[-1] != self.eos_id):
                        ids.append(self.eos_id)
                    fresh = True
                yield np.asarray(ids, self.dtype), loss, piece.last

    def _encode_batch(self, batch: list[Piece]) -> list[tuple[Any, Mask]]:
        contents: list[Any] = [piece.content for piece in batch]
        if self.chat:
            return list(encode_chats(self.tokenizer, contents, [piece.where for piece in batch]))
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return [(ids, None) for ids in self.tokenizer(contents, **options)["input_ids"]]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Batches of about a million characters, so that neither many small nor few large ones fill memory."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += _characters(piece.content)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(content: str | list[dict[str, Any]]) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(str(message.get("content") or "")) for message in content)
