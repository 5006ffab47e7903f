"""What a text must be, as the tokens that may come next. Needs the package llguidance."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from moeforge.errors import RunError, UserError
from moeforge.serve.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_WALL_SECONDS = 30  # on a busy machine, the program's two seconds of computing may take this long
_TRYING = threading.BoundedSemaphore(2)
_wrapped: WeakKeyDictionary[Any, dict[tuple[int, frozenset[int]], LLTokenizer]] = WeakKeyDictionary()
_wrapping = threading.Lock()


class Grammar:
    """Where one continuation stands in the grammar that it follows.

    ends      the model's end tokens, which are allowed where the text may end
    error     why it cannot go on, once it cannot; then every token is refused
    finished  whether the text is complete and nothing but its end may follow
    """

    def __init__(self, matcher: LLMatcher, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self.ends = ends
        self.error: str | None = None
        self.finished = False

    def copy(self) -> Grammar:
        """One that stands at the same place, and goes on alone."""
        other = Grammar(self._matcher.deep_copy(), self.ends)
        other.error, other.finished = self.error, self.finished
        return other

    def mask(self) -> bytes:
        """A bit for each token that may come next (the lowest bit of a byte is its first token), no bit set after an
        error; a whole number of 32-bit words, at least one bit for each token of the vocabulary."""
        bits: bytes = self._matcher.compute_bitmask()
        if not self._failed() and not any(bits):
            self.error = "structured_outputs: the model's tokens cannot write what the schema asks for"
        return bits if self.error is None else bytes(len(bits))

    def accept(self, token: int) -> bool:
        """Go on with a token; False, with an `error`, if it is not allowed."""
        if self.error is None and not self._matcher.consume_token(token) and not self._failed():
            self.error = f"structured_outputs: token {token} is not allowed here"
        self.finished = self.error is None and self._matcher.is_stopped()
        return self.error is None

    def _failed(self) -> bool:
        from moeforge.serve.schema_check import matcher_error

        if self.error is None and (reason := matcher_error(self._matcher)) is not None:
            self.error = f"structured_outputs: {reason}"
        return self.error is not None


def compile_grammar(
    structured_outputs: StructuredOutputsParams, tokenizer: Any, vocab_size: int, ends: Collection[int] = ()
) -> Grammar:
    """The grammar, at its beginning. Each continuation needs a `copy` of its own.

    tokenizer   transformers', a fast one; the first time takes half a second
    vocab_size  tokens of the model; those that its tokenizer lacks are never allowed
    ends        the model's end tokens; none: the tokenizer's

    A schema takes at most two seconds of computing twice over, and bounded memory; then it counts as too complex. Where
    others must not wait for that, call this in a thread of its own.

    Raises UserError for a schema that is not supported, that nothing can satisfy or that is too complex, for a
    tokenizer that is not supported, and where llguidance is not installed. RunError if a schema could not be tried.
    """
    try:
        from moeforge.serve.schema_check import matcher_error, schema_matcher
    except ImportError as error:
        raise UserError("structured_outputs: llguidance is not installed; pip install 'moeforge[serve]'") from error
    if structured_outputs.json is not None and (reason := _tried(structured_outputs.schema)):
        raise UserError(f"structured_outputs: the JSON schema cannot be used ({reason})")
    known = frozenset(ends)
    if not known and tokenizer is not None and tokenizer.eos_token_id is not None:
        known = frozenset((tokenizer.eos_token_id,))
    matcher = schema_matcher(structured_outputs.schema, _wrap(tokenizer, vocab_size, known))
    if (fault := matcher_error(matcher)) is not None:
        raise UserError(f"structured_outputs: the JSON schema cannot be used ({fault})")
    return Grammar(matcher, known)


@lru_cache(maxsize=256)
def _tried(schema: str) -> str:
    """Why a schema cannot be used; empty if it can."""
    from moeforge.serve import schema_check

    # -P: what lies beside the program must not hide modules of the same name.
    command = [sys.executable, "-P", schema_check.__file__]
    with _TRYING:
        try:
            done = subprocess.run(
                command, input=schema.encode(errors="surrogatepass"), capture_output=True, timeout=_WALL_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise UserError("structured_outputs: the JSON schema takes too long to compile") from error
    if done.returncode < 0:  # the kernel ended it
        return f"it is too complex: it takes more than {schema_check.CPU_SECONDS} seconds, or too much memory"
    if done.returncode > 0:
        words = done.stderr.decode(errors="replace").split()
        raise RunError(f"structured_outputs: schema_check.py failed: {' '.join(words)[-300:]}")
    return done.stdout.decode(errors="replace").strip()


def _wrap(tokenizer: Any, vocab_size: int, ends: frozenset[int]) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    if tokenizer is None:
        raise UserError("structured_outputs: needs the model's tokenizer, which it came without")
    if not ends:
        raise UserError("structured_outputs: needs an end token, which neither the model nor its tokenizer has")
    with _wrapping:
        known = _wrapped.setdefault(tokenizer, {})
        key = max(vocab_size, len(tokenizer)), ends
        if key not in known:
            try:
                known[key] = from_tokenizer(tokenizer, n_vocab=key[0], eos_token=sorted(ends))
            except ValueError as error:
                raise UserError(f"structured_outputs: the model's tokenizer is not supported ({error})") from error
        return known[key]
