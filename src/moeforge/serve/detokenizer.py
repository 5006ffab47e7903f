"""Tokens to text, one token at a time, with bounded work for each."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

_HALF = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8  # tokens of the prompt that the text goes on from
_WINDOW = 8  # tokens decoded at once, more only while the last ones end amid a character ...
_WINDOW_LIMIT = 32  # ... and never more than this
_new_utf8 = codecs.getincrementaldecoder("utf-8")
_known: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()


class Detokenizer:
    """Text of the tokens that follow a prompt, without special tokens.

    Joined, the pieces are what decoding all tokens at once gives. Only for bytes that are not UTF-8 the fallback bytes
    of SentencePiece's tokenizers come out as in other tokenizers: a replacement character for each sequence that no
    character begins with, while decoding at once spoils the characters beside them too.

    A token's text depends on its neighbours: a character may be spread over several, and SentencePiece drops the space
    before the first. So a window of tokens is decoded anew with each of them, and what its text had before is left
    out; the window begins where a character ended.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = _decoder(tokenizer)
        self._bytes = _fallback_bytes(tokenizer)
        self._letter = next((token for token, byte in self._bytes.items() if byte == ord("A")), -1)
        self._utf8 = _new_utf8("replace")
        self._amid_bytes = False  # of a character, in fallback bytes
        self._window = list(prompt_token_ids[-_CONTEXT:])
        text = self._decode(self._window)
        if text.endswith(_HALF):
            self._window, text = [], ""
        self._shown = len(text)  # characters of the window's text that are not to be given again
        self._held = ""
        self._boundary = len(self._window)  # where the window may be cut: a character ends here

    def append(self, token: int) -> str:
        """The text that is certain now and was not before: all but half a character at the end."""
        byte = self._bytes.get(token)
        if byte is not None and (byte >= 0x80 or self._amid_bytes):
            return self._append_byte(byte)
        self._window.append(token)
        text = self._decode(self._window)
        new = text[self._shown :]
        if not new and (self._shown or len(self._window) > _WINDOW_LIMIT):
            # A special token: no text, and no context either (after it alone, SentencePiece drops a space).
            self._window.pop()
            return ""
        before = self._end_bytes()
        # Half a character shows as one replacement character; those before it stay.
        self._held = _HALF if new.endswith(_HALF) else ""
        certain = new[: len(new) - len(self._held)]
        self._shown += len(certain)
        if not self._held:
            if len(self._window) > _WINDOW:
                self._cut(self._boundary)
            self._boundary = len(self._window)
        elif len(self._window) > _WINDOW_LIMIT:  # hardly characters
            self._cut(len(self._window) - _WINDOW_LIMIT // 2)
            self._boundary = 0
        return before + certain

    def flush(self) -> str:
        """The half character that is left when no token follows."""
        held, self._held = self._held, ""
        self._shown += len(held)
        return self._end_bytes() + held

    def _append_byte(self, byte: int) -> str:
        before = self.flush() if not self._amid_bytes else ""
        new = self._utf8.decode(bytes((byte,)))
        self._amid_bytes = self._utf8.getstate()[0] != b""
        # What follows goes on from a letter: the decoder shall see no part of a character.
        self._window, self._shown, self._boundary = [self._letter], 1, 1
        return before + new

    def _end_bytes(self) -> str:
        self._amid_bytes = False
        return self._utf8.decode(b"", final=True)

    def _cut(self, begin: int) -> None:
        """Begins the window at a token, if there is text after it to go on from."""
        window = self._window[begin:]
        shown = len(self._decode(window)) - len(self._held)
        if shown > 0 or self._held:
            self._window, self._shown = window, shown


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    # The object behind transformers' tokenizer does the same in a tenth of the time.
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        return lambda ids: str(fast.decode(ids, skip_special_tokens=True))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _fallback_bytes(tokenizer: Any) -> dict[int, int]:
    """The tokens that stand for a byte wherever no other token fits, as <0x41>, and their bytes."""
    if tokenizer not in _known:
        tokens = {tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>"): byte for byte in range(256)}
        tokens.pop(None, None)
        letter = [token for token, byte in tokens.items() if byte == ord("A")]
        has_them = len(tokens) == 256 and _decoder(tokenizer)(letter) == "A"
        _known[tokenizer] = tokens if has_them else {}
    return _known[tokenizer]
