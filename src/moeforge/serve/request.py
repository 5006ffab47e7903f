"""One running request: its tokens so far, its text so far, and whether it has ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from moeforge.serve.outputs import CompletionOutput, FinishReason, RequestOutput
from moeforge.serve.sampling import SamplingParams


@dataclass
class Request:
    """A prompt that is being continued.

    `room` is the most tokens that may follow the prompt; `ends` the tokens that end it. Without a tokenizer
    the text is empty.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    room: int
    ends: Collection[int]
    tokenizer: Any | None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _stopped_text: str | None = None

    def append(self, token: int) -> None:
        """Take the sampled token and decide whether it was the last."""
        self.token_ids.append(token)
        if token in self.ends:
            self.finish_reason = "stop"
        elif self.params.stop and (end := self._stop_string_at(text := self._decoded())) is not None:
            self._stopped_text = text[:end]
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.room:
            self.finish_reason = "length"

    def _stop_string_at(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for stop in self.params.stop if (at := text.find(stop)) >= 0), default=None)

    def _decoded(self) -> str:
        if self.tokenizer is None:
            return ""
        # All tokens at once, after the prompt's last one: a character may be spread over several tokens, and
        # SentencePiece drops the space before the first.
        before = self.prompt_token_ids[-1:]
        return self._decode(before + self.token_ids)[len(self._decode(before)) :]

    def _decode(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **options))

    def text(self) -> str:
        """The text so far. While running, without half a character or the start of a stop string."""
        if self._stopped_text is not None:
            return self._stopped_text
        text = self._decoded()
        if self.finish_reason is not None:
            return text
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        held = max(
            (n for stop in self.params.stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        return text[: len(text) - held]

    def output(self) -> RequestOutput:
        """The request as it stands."""
        completion = CompletionOutput(0, self.text(), list(self.token_ids), self.finish_reason)
        return RequestOutput(self.prompt, self.prompt_token_ids, [completion])
