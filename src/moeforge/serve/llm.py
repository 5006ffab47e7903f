"""`LLM`: a model and its tokenizer, for offline generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.inference import load_for_inference
from moeforge.errors import UserError
from moeforge.serve.batch import StaticBatch
from moeforge.serve.outputs import RequestOutput
from moeforge.serve.request import Request
from moeforge.serve.sampling import SamplingParams

Prompt = str | list[int]
Message = dict[str, Any]
Progress = Callable[[list[RequestOutput]], None]


class _Encoded(NamedTuple):
    text: str | None
    ids: list[int]


class LLM:
    """A loaded model, in the manner of vLLM's class of this name.

    model          directory, GGUF file, hub id or preset
    dtype          auto (as stored; bf16 for GGUF), bf16, fp32 or fp64
    device         auto (a GPU if there is one) or a torch device
    max_model_len  most positions of prompt and continuation together; None: what the model was made for

    Raises UserError for a model that cannot be loaded or a length beyond its positions.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
    ) -> None:
        checkpoint = open_checkpoint(model)
        self.config = checkpoint.config
        positions = self.config.max_positions
        self.max_model_len = positions if max_model_len is None else max_model_len
        if not 1 <= self.max_model_len <= positions:
            raise UserError(f"max_model_len = {max_model_len}: must be between 1 and the model's {positions}")
        self._tokenizer: Any | None = None
        self._no_tokenizer: UserError | None = None
        try:
            self._tokenizer = checkpoint.tokenizer()
        except UserError as error:  # token ids can be continued without one
            self._no_tokenizer = error
        self.model = load_for_inference(checkpoint, dtype, device)
        self._ends = set(self.config.eos_token_ids)
        if self._tokenizer is not None and self._tokenizer.eos_token_id is not None:
            self._ends.add(self._tokenizer.eos_token_id)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, transformers'. Raises UserError if it came without one."""
        if self._no_tokenizer is not None:
            raise self._no_tokenizer
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_step: Progress | None = None,
    ) -> list[RequestOutput]:
        """Continue texts or token ids, all in one batch; outputs in the prompts' order.

        One SamplingParams for all, or one a prompt. `on_step` sees all requests after each step.
        Raises UserError for a prompt that is empty, too long or outside the vocabulary.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        listed: list[Any] = [prompts] if one else list(prompts)
        encoded = [self._encode(p) if isinstance(p, str) else _Encoded(None, list(p)) for p in listed]
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
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        # The template writes the special tokens itself.
        encoded = [self._encode(self._render(chat), add_special_tokens=False) for chat in conversations]
        return self._run(encoded, sampling_params, on_step)

    def _encode(self, text: str, add_special_tokens: bool = True) -> _Encoded:
        ids = self.get_tokenizer()(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return _Encoded(text, list(ids))

    def _render(self, conversation: Any) -> str:
        tokenizer = self.get_tokenizer()
        if not tokenizer.chat_template:
            raise UserError("chat: the model's tokenizer has no chat template; give a plain prompt instead")
        try:
            return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise UserError(f"chat: the chat template refuses the conversation ({error})") from error

    def _run(
        self,
        prompts: list[_Encoded],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        on_step: Progress | None,
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise UserError(f"sampling_params: {len(params)} for {len(prompts)} prompts; give one, or one each")
        requests = [self._request(i, prompt, params[i]) for i, prompt in enumerate(prompts)]
        if requests:
            batch = StaticBatch(self.model, requests)
            while batch.running:
                batch.step()
                if on_step is not None:
                    on_step([request.output() for request in requests])
        return [request.output() for request in requests]

    def _request(self, index: int, prompt: _Encoded, params: SamplingParams) -> Request:
        ids, limit, vocab_size = prompt.ids, self.max_model_len, self.config.vocab_size
        if not ids:
            raise UserError(f"prompt {index}: is empty (no tokens)")
        if len(ids) >= limit:
            raise UserError(
                f"prompt {index}: has {len(ids)} tokens; max_model_len = {limit} allows at most {limit - 1}"
            )
        if not all(0 <= token < vocab_size for token in ids):
            raise UserError(f"prompt {index}: token ids must be between 0 and {vocab_size - 1}")
        if params.stop and self._tokenizer is None:
            self.get_tokenizer()
        return Request(
            prompt=prompt.text,
            prompt_token_ids=ids,
            params=params,
            room=min(params.max_tokens, limit - len(ids)),
            ends=frozenset(params.stop_token_ids).union(() if params.ignore_eos else self._ends),
            tokenizer=self._tokenizer,
        )
