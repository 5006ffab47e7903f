"""A generation as OpenAI's objects: one class an endpoint."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

from moeforge.serve.openai.generation import Generation
from moeforge.serve.openai.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from moeforge.serve.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from moeforge.serve.outputs import CompletionDelta, Sampled

Json = dict[str, Any]


class Writer(ABC):
    """What both endpoints have in common: the frame around choices, and usage."""

    whole_object: str
    chunk_object: str

    def __init__(
        self, request: GenerationRequest, generation: Generation, model: str, texts: TokenTexts, logprobs: int | None
    ) -> None:
        self._wanted, self.generation = request, generation
        self._texts, self._logprobs = texts, logprobs
        self._head = {"id": generation.request_id, "created": int(time.time()), "model": model}

    @abstractmethod
    def _choice(self, index: int, delta: CompletionDelta, streamed: bool) -> Json:
        """One choice, or what a chunk adds to it, without what the endpoints share."""

    def _opening(self) -> list[Json]:
        """Choices of chunks that come before any token."""
        return []

    async def events(self) -> AsyncGenerator[list[Json], None]:
        """The chunks of a stream, a list for each step."""
        head = self._head | {"object": self.chunk_object}
        usage: Json = {"usage": None} if self._wanted.include_usage else {}
        if opening := self._opening():
            yield [head | {"choices": [choice]} | usage for choice in opening]
        async for step in self.generation.deltas():
            yield [head | {"choices": [self._finished(*choice, True)]} | usage for choice in step]
        if self._wanted.include_usage:
            yield [head | {"choices": [], "usage": self.generation.usage}]

    async def whole(self) -> Callable[[], Json]:
        """What makes the answer in one piece, once all has been said. It may take long, and be called in a thread."""
        sampled = self._logprobs is not None or bool(self._wanted.return_token_ids)
        parts = [_Parts() for _ in range(self.generation.choices)]
        async for step in self.generation.deltas():
            for index, delta in step:
                parts[index].add(delta, sampled)
        return lambda: self._whole(parts)

    @property
    def values(self) -> int:
        """About how many tokens and log-probabilities the answer holds."""
        return self.generation.completion_tokens * (1 + (self._logprobs or 0))

    def _whole(self, parts: list[_Parts]) -> Json:
        choices = [self._finished(index, one.joined(), False) for index, one in enumerate(parts)]
        return self._head | {"object": self.whole_object, "choices": choices, "usage": self.generation.usage}

    def _finished(self, index: int, delta: CompletionDelta, streamed: bool) -> Json:
        choice: Json = {"index": index} | self._choice(index, delta, streamed)
        choice |= {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        if self._wanted.return_token_ids:
            choice["token_ids"] = [sampled.token for sampled in delta.sampled]
        return choice


class CompletionWriter(Writer):
    """`text_completion` objects."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, request: CompletionRequest, generation: Generation, model: str, texts: TokenTexts) -> None:
        super().__init__(request, generation, model, texts, request.logprobs)
        self._offsets = [0] * generation.choices

    def _choice(self, index: int, delta: CompletionDelta, streamed: bool) -> Json:
        logprobs = None
        if self._logprobs is not None and delta.sampled:
            logprobs, self._offsets[index] = completion_logprobs(delta.sampled, self._texts, self._offsets[index])
        return {"text": delta.text, "logprobs": logprobs}


class ChatWriter(Writer):
    """`chat.completion` objects, and `chat.completion.chunk`, the first of which tell the role."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatCompletionRequest, generation: Generation, model: str, texts: TokenTexts) -> None:
        super().__init__(request, generation, model, texts, (request.top_logprobs or 0) if request.logprobs else None)

    def _opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(self.generation.n)]

    def _choice(self, index: int, delta: CompletionDelta, streamed: bool) -> Json:
        logprobs = None
        if self._logprobs is not None and delta.sampled:
            logprobs = chat_logprobs(delta.sampled, self._texts, self._logprobs)
        if streamed:
            return {"delta": {"content": delta.text} if delta.sampled or delta.text else {}, "logprobs": logprobs}
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"message": message, "logprobs": logprobs}


class _Parts:
    """What came of one continuation so far."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._sampled: list[Sampled] = []
        self._last: CompletionDelta | None = None

    def add(self, delta: CompletionDelta, sampled: bool) -> None:
        """What is new; with its tokens, where they will be shown."""
        self._text.append(delta.text)
        if sampled:
            self._sampled += delta.sampled
        self._last = delta

    def joined(self) -> CompletionDelta:
        """All as one delta."""
        assert self._last is not None
        text = "".join(self._text)
        return replace(self._last, text=text, sampled=tuple(self._sampled))
