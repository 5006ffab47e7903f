"""`LLM`: a model and its tokenizer, for offline generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.serve.engine import Engine
from moeforge.serve.outputs import RequestOutput
from moeforge.serve.prompt import Message, encode, render_chat
from moeforge.serve.request import Request
from moeforge.serve.sampling_params import SamplingParams

Prompt = str | list[int]
Progress = Callable[[list[RequestOutput]], None]


class LLM:
    """A loaded model, in the manner of vLLM's class of this name.

    `model`: directory, GGUF file, hub id or preset. `settings` are those of `EngineConfig`: dtype, device,
    tensor_parallel_size, max_model_len, max_num_seqs, enable_prefix_caching, ... Used by one thread at a time.

    Raises UserError for a model that cannot be loaded or does not fit, and for settings that do not go with it.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        try:
            config = EngineConfig(**settings)
        except TypeError as error:
            raise UserError(f"LLM: {str(error).rpartition('() ')[2]}; settings are those of EngineConfig") from error
        self.engine = Engine(config, model)

    @property
    def max_model_len(self) -> int:
        """Most positions of prompt and continuation together."""
        return self.engine.max_model_len

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, transformers'. Raises UserError if none was wanted."""
        return self.engine.get_tokenizer()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_step: Progress | None = None,
    ) -> list[RequestOutput]:
        """Continue texts or token ids, batched as places and pages allow; outputs in the prompts' order.

        One SamplingParams for all, or one a prompt. `on_step` sees all requests after each step.
        Raises UserError for a prompt that is empty, too long or outside the vocabulary.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        listed: list[Any] = [prompts] if one else list(prompts)
        encoded = [(p, encode(self.get_tokenizer(), p)) if isinstance(p, str) else (None, list(p)) for p in listed]
        return self._run(encoded, sampling_params, on_step)

    def chat(
        self,
        messages: list[Message] | Sequence[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_step: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, each a list of {"role": ..., "content": ...}.

        Raises UserError where the tokenizer has no chat template or its template refuses the conversation.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        tokenizer = self.get_tokenizer()
        texts = [render_chat(tokenizer, conversation) for conversation in conversations]
        # The template writes the special tokens itself.
        encoded = [(text, encode(tokenizer, text, add_special_tokens=False)) for text in texts]
        return self._run(encoded, sampling_params, on_step)

    def close(self) -> None:
        """End the other ranks' processes, if there are any."""
        self.engine.close()

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        on_step: Progress | None,
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise UserError(f"sampling_params: {len(params)} for {len(prompts)} prompts; give one, or one each")
        groups = [self._requests(i, *prompt, params[i]) for i, prompt in enumerate(prompts)]
        waiting = [request for group in groups for request in group]
        try:
            self._work_off(waiting, lambda: on_step and on_step(_outputs(prompts, groups)))
        except BaseException:
            for index in range(len(groups)):
                self.engine.abort(str(index))
            raise
        return _outputs(prompts, groups)

    def _requests(self, index: int, prompt: str | None, ids: list[int], params: SamplingParams) -> list[Request]:
        try:
            return self.engine.requests(str(index), prompt, ids, params)
        except UserError as error:
            raise UserError(f"prompt {index}: {str(error).removeprefix('prompt: ')}") from error

    def _work_off(self, requests: Sequence[Request], after_step: Callable[[], object]) -> None:
        """Everything at once, however many: the bound on waiting requests is for those who can come again."""
        pending = list(reversed(requests))
        while pending or self.engine.has_work:
            while pending and self.engine.has_room:
                self.engine.add(pending.pop())
            self.engine.step()
            after_step()


def _outputs(
    prompts: Sequence[tuple[str | None, list[int]]], groups: Sequence[Sequence[Request]]
) -> list[RequestOutput]:
    return [
        RequestOutput(text, ids, [request.output() for request in group])
        for (text, ids), group in zip(prompts, groups, strict=True)
    ]
