"""Texts and conversations as token ids, off the event loop where that takes long."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, TypeVar

from moeforge.errors import UserError
from moeforge.serve.openai.errors import ApiError, bad_request, shown
from moeforge.serve.prompt import encode, render_chat

_LONG_TOKEN = 16
_ON_LOOP = 4096  # characters that are tokenised in place: a millisecond or two, less than a thread is worth
T = TypeVar("T")


class Prompt(NamedTuple):
    """A prompt as the engine takes it."""

    text: str | None
    ids: list[int]


class Prompts:
    """Makes prompts for a context of `max_model_len` positions. `tokenizer`: transformers', if there is one."""

    def __init__(self, tokenizer: Any | None, max_model_len: int) -> None:
        self._tokenizer, self.max_model_len = tokenizer, max_model_len
        longest = 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()), default=0)
        # Some tokenizers drop spaces or fold what they do not know: a margin, where all tokens are short.
        self._most_characters = max_model_len * max(longest, _LONG_TOKEN)
        # One thread: long prompts wait for each other, never short ones or running streams for them.
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def completion(self, given: str | list[int], add_special_tokens: bool, room: int | None) -> Prompt:
        """A text or token ids, which must leave `room` positions (None: one). Raises ApiError (400)."""
        if isinstance(given, str):
            text = given
            ids = await self._run(len(text), lambda: self._encode(text, add_special_tokens, "prompt"))
            return self._checked(Prompt(text, ids), "prompt", room)
        return self._checked(Prompt(None, given), "prompt", room)

    async def chat(self, conversation: list[dict[str, str]], options: dict[str, Any], room: int | None) -> Prompt:
        """A conversation through the checkpoint's own template, with its `options`. Raises ApiError (400)."""
        taken = _template_arguments()
        for name in options:
            if name in taken:
                raise bad_request(f"chat_template_kwargs: {name} is not for requests to set", "chat_template_kwargs")

        def make() -> Prompt:
            text = self._render(conversation, options)
            return Prompt(text, self._encode(text, False, "messages"))  # the template writes the special tokens itself

        # A template may write its options with every turn.
        each = 64 + sum(len(str(name)) + len(str(value)) for name, value in options.items())
        length = sum(len(value) for turn in conversation for value in turn.values()) + each * len(conversation)
        return self._checked(await self._run(length, make), "messages", room)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, characters: int, make: Callable[[], T]) -> T:
        """Where nobody waits for it any more before its turn, it is not done."""
        if characters <= _ON_LOOP:
            await asyncio.sleep(0)  # a list of many short prompts leaves gaps for running streams
            return make()
        return await asyncio.get_running_loop().run_in_executor(self._thread, make)

    def _needed(self) -> Any:
        if self._tokenizer is None:
            raise bad_request(
                "prompt: the server runs without a tokenizer; give token ids to /v1/completions", "prompt"
            )
        return self._tokenizer

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        tokenizer = self._needed()
        if len(text) > self._most_characters:  # more than so many tokens: not worth counting them
            raise self._too_long(f"{param}: has {len(text)} characters", param, self.max_model_len - 1)
        return encode(tokenizer, text, add_special_tokens)

    def _render(self, conversation: list[dict[str, str]], options: dict[str, Any]) -> str:
        try:
            return render_chat(self._needed(), conversation, **options)
        except UserError as error:
            raise bad_request(shown(str(error), 300), "messages") from error

    def _checked(self, prompt: Prompt, param: str, room: int | None) -> Prompt:
        count, limit = len(prompt.ids), self.max_model_len
        if count >= limit:
            raise self._too_long(f"{param}: has {count} tokens", param, limit - 1)
        if room is not None and count + room > limit:
            raise self._too_long(f"max_tokens = {room}: the prompt has {count} tokens", "max_tokens", limit - count)
        return prompt

    def _too_long(self, what: str, param: str, allowed: int) -> ApiError:
        message = f"{what}; with a context of {self.max_model_len} tokens at most {allowed} are possible"
        return bad_request(message, param, "context_length_exceeded")


@cache
def _template_arguments() -> frozenset[str]:
    """What `apply_chat_template` and the renderer below it take themselves, so that no request may name it."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    functions = (PreTrainedTokenizerBase.apply_chat_template, chat_template_utils.render_jinja_template)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names | {"messages", "raise_exception", "strftime_now"})
