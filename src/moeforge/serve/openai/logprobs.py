"""Log-probabilities as both endpoints write them, and the text and bytes of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeforge.serve.outputs import Sampled


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, backwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenTexts:
    """The text and the bytes of token ids, remembered. Without a tokenizer the text is the number.

    A token may be a part of a character: its bytes are right, its text holds a replacement character.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}
        self._special: frozenset[int] = frozenset()
        self._alphabet: dict[str, int] = {}
        if tokenizer is not None:
            self._special = frozenset(tokenizer.added_tokens_decoder)
            vocabulary = tokenizer.get_vocab()
            alphabet = _byte_alphabet()
            if all(letter in vocabulary for letter in ("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "\u010a")):
                self._alphabet = alphabet

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """Text and bytes."""
        if token not in self._known:
            raw = self._bytes(token)
            self._known[token] = raw.decode("utf-8", "replace"), list(raw)
        return self._known[token]

    def _bytes(self, token: int) -> bytes:
        if self._tokenizer is None:
            return str(token).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # ids beyond the tokenizer, which padded vocabularies have
            return b""
        if token in self._special:
            return str(piece).encode()
        if self._alphabet:
            if all(letter in self._alphabet for letter in piece):
                return bytes(self._alphabet[letter] for letter in piece)
            return str(piece).encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def chat_logprobs(sampled: Sequence[Sampled], texts: TokenTexts, count: int) -> dict[str, Any]:
    """For chat completions: each token with its `count` likeliest alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, raw = texts(token)
        return {"token": text, "logprob": logprob, "bytes": raw}

    content = [
        entry(s.token, s.logprob or 0.0)
        | {"top_logprobs": [entry(*pair) for pair in list((s.top_logprobs or {}).items())[:count]]}
        for s in sampled
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(sampled: Sequence[Sampled], texts: TokenTexts, offset: int) -> tuple[dict[str, Any], int]:
    """For completions; `offset`: characters before these tokens. Also returns the offset after them."""
    tokens, offsets, top = [], [], []
    for s in sampled:
        text, _ = texts(s.token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        likely: dict[str, float] = {}
        for token, logprob in (s.top_logprobs or {}).items():
            likely.setdefault(texts(token)[0], logprob)  # of tokens with the same text the likeliest
        top.append(likely)
    return {
        "tokens": tokens,
        "token_logprobs": [s.logprob for s in sampled],
        "top_logprobs": top,
        "text_offset": offsets,
    }, offset
