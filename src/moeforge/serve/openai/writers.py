"""A generation as OpenAI's objects: one class an endpoint."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from moeforge.serve.openai.generation import Generation
from moeforge.serve.openai.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from moeforge.serve.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from moeforge.serve.outputs import CompletionDelta

Json = dict[str, Any]


class Writer:
    """What both endpoints have in common: the frame around choices, and usage."""

    whole_object: str
    chunk_object: str

    def __init__(self, request: GenerationRequest, generation: Generation, model: str) -> None:
        self._wanted, self.generation = request, generation
        self._head = {"id": generation.request_id, "created": int(time.time()), "model": model}

    def _choice(self, index: int, delta: CompletionDelta, streamed: bool) -> Json:
        """One choice, or what a chunk adds to it, without what the endpoints share."""
        raise NotImplementedError

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

    async def whole(self) -> Json:
        """The answer in one piece."""
        parts: dict[int, list[CompletionDelta]] = {}
        async for step in self.generation.deltas():
            for index, delta in step:
                parts.setdefault(index, []).append(delta)
        choices = [self._finished(index, _joined(parts[index]), False) for index in sorted(parts)]
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
        super().__init__(request, generation, model)
        self._logprobs, self._texts = request.logprobs is not None, texts
        self._offsets = [0] * generation.choices

    def _choice(self, index: int, delta: CompletionDelta, streamed: bool) -> Json:
        logprobs = None
        if self._logprobs and delta.sampled:
            logprobs, self._offsets[index] = completion_logprobs(delta.sampled, self._texts, self._offsets[index])
        return {"text": delta.text, "logprobs": logprobs}


class ChatWriter(Writer):
    """`chat.completion` objects, and `chat.completion.chunk`, the first of which tell the role."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatCompletionRequest, generation: Generation, model: str, texts: TokenTexts) -> None:
        super().__init__(request, generation, model)
        self._logprobs = (request.top_logprobs or 0) if request.logprobs else None
        self._texts = texts

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


def _joined(deltas: list[CompletionDelta]) -> CompletionDelta:
    """All deltas of one continuation as one."""
    last = deltas[-1]
    return CompletionDelta(
        last.index,
        "".join(delta.text for delta in deltas),
        tuple(sampled for delta in deltas for sampled in delta.sampled),
        last.finish_reason,
        last.stop_reason,
    )
