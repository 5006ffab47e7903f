"""One sequence that is being continued: its tokens and text so far, and whether it has ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeforge.errors import UserError
from moeforge.serve.detokenizer import Detokenizer
from moeforge.serve.noise import request_key
from moeforge.serve.outputs import CompletionDelta, CompletionOutput, FinishReason, Sampled
from moeforge.serve.sampling_params import SamplingParams
from moeforge.serve.stop_strings import StopStrings

if TYPE_CHECKING:
    from moeforge.serve.grammar import Grammar


@dataclass(eq=False)  # a request is itself, whatever it holds
class Request:
    """A prompt and one continuation of it, number `index` of `params.n`.

    room              the most tokens that may follow
    ends              given: the model's own end tokens; kept: all tokens that end this request
    tokenizer         None: the text is empty
    cache_salt        whose pages of the prefix cache it shares
    grammar           what the text must follow, this continuation's own copy
    all_token_ids     prompt and continuation; grows in place
    noise_key         what its draws come from, beside their positions
    keeps_history     whether `output` will be asked for; where `take_delta` hands on everything, it is not
    block_ids, num_computed_tokens   its pages, and how many tokens they hold: the scheduler's

    Raises UserError for stop strings without a tokenizer.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    room: int
    ends: Collection[int] = ()
    tokenizer: Any | None = None
    index: int = 0
    cache_salt: bytes = b""
    grammar: Grammar | None = None
    all_token_ids: list[int] = field(init=False)
    noise_key: int = field(init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)
    keeps_history: bool = field(default=True, init=False)
    block_ids: list[int] = field(default_factory=list, init=False)
    num_computed_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        params = self.params
        if params.stop and self.tokenizer is None:
            raise UserError("stop: needs the model's tokenizer, which it came without")
        self._unnamed_ends = frozenset(() if params.ignore_eos else self.ends)
        if self.grammar is not None:  # whatever else is ignored: no other token may follow a complete text
            self._unnamed_ends |= self.grammar.ends
        self.ends = self._unnamed_ends.union(params.stop_token_ids or ())
        self.all_token_ids = list(self.prompt_token_ids)
        self.noise_key = request_key(params.seed, self.index)
        self._detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, self.prompt_token_ids)
        self._stop_strings = StopStrings(params.stop or ())
        self._text: list[str] = []
        self._logprobs: list[Sampled] | None = None if params.logprobs is None else []
        self._new_text: list[str] = []
        self._new_sampled: list[Sampled] = []

    @property
    def num_tokens(self) -> int:
        """Of prompt and continuation."""
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Of the continuation."""
        return len(self.all_token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The continuation, with the token that ended it (a copy)."""
        return self.all_token_ids[len(self.prompt_token_ids) :]

    def append(self, sampled: Sampled) -> None:
        """Take the next token and decide whether it was the last.

        The text of a token that ends the request is left out, like a stop string. A token that the grammar does not
        allow, as its limits are exceeded, is not taken: then the request is aborted, and `stop_reason` says why. So it
        is after any other fault in its text: no other request is to suffer for that.
        """
        try:
            self._append(sampled)
        except Exception as error:
            self.finish_reason, self.stop_reason = "abort", f"text: {type(error).__name__}: {error}"

    def _append(self, sampled: Sampled) -> None:
        token = sampled.token
        ends = token in self.ends
        if not ends and self.grammar is not None and not self.grammar.accept(token):
            self._finish("abort", self.grammar.error)
            return
        self.all_token_ids.append(token)
        self._new_sampled.append(sampled)
        if self._logprobs is not None and self.keeps_history:
            self._logprobs.append(sampled)
        if ends:
            self._finish("stop", None if token in self._unnamed_ends else token)
            return
        if self._detokenizer is not None:
            self._show(self._detokenizer.append(token))
        if self.finish_reason is None:
            if self.grammar is not None and self.grammar.finished:
                self._finish("stop")
            elif self.num_output_tokens >= self.room:
                self._finish("length")

    def abort(self) -> None:
        """End it as it stands."""
        if self.finish_reason is None:
            self._finish("abort")

    def take_delta(self) -> CompletionDelta:
        """What is new since the last call. While running, the text lacks half characters and what may begin a stop
        string."""
        text, sampled = "".join(self._new_text), tuple(self._new_sampled)
        self._new_text.clear()
        self._new_sampled.clear()
        return CompletionDelta(self.index, text, sampled, self.finish_reason, self.stop_reason)

    def output(self) -> CompletionOutput:
        """Everything so far, where `keeps_history`; the text is that of all deltas together."""
        return CompletionOutput(
            self.index,
            "".join(self._text),
            self.output_token_ids,
            self.finish_reason,
            self.stop_reason,
            None if self._logprobs is None else list(self._logprobs),
        )

    def _show(self, text: str) -> None:
        if not text:
            return
        text, stop = self._stop_strings.append(text, ignore=self.num_output_tokens <= self.params.min_tokens)
        self._add_text(text)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop

    def _add_text(self, text: str) -> None:
        if text:
            if self.keeps_history:
                self._text.append(text)
            self._new_text.append(text)

    def _finish(self, finish_reason: FinishReason, stop_reason: int | str | None = None) -> None:
        if self._detokenizer is not None:
            self._show(self._detokenizer.flush())  # which may complete a stop string
            if self.finish_reason is not None:
                return
            self._add_text(self._stop_strings.flush())
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
