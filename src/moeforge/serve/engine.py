"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeforge.config.model import ModelConfig
from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.serve.build import layout_of, length_limit, make_runner, open_model
from moeforge.serve.grammar import compile_grammar
from moeforge.serve.paged_attention import in_attention_order
from moeforge.serve.ranks import TensorParallelRunner
from moeforge.serve.request import Request
from moeforge.serve.sampler import Sampler
from moeforge.serve.sampling_params import SamplingParams
from moeforge.serve.scheduler import ScheduledRequest, Scheduler
from moeforge.serve.step import SequenceStep, StepBatch


class Engine:
    """A loaded model with its ranks, pages and scheduler, used by one thread at a time.

    `on_failure` is called, in a thread of its own, if another rank dies; every later step raises RunError.
    Raises UserError for a model that cannot be loaded or does not fit, and for settings that do not go with it.
    """

    def __init__(
        self, settings: EngineConfig, model: str | Path, on_failure: Callable[[str], None] | None = None
    ) -> None:
        opened = open_model(settings, str(model))
        self.model_config: ModelConfig = opened.config
        self.layout = layout_of(settings, opened.config)
        self.tokenizer: Any | None = opened.tokenizer
        self._ends = opened.ends
        self.max_model_len = length_limit(settings, opened.config)
        self.settings = dataclasses.replace(settings, max_model_len=self.max_model_len)
        self.runner = TensorParallelRunner(self.settings, str(model), self.layout, make_runner, on_failure)
        self.sampler = Sampler(opened.config.vocab_size, self.runner.device)
        self.scheduler = Scheduler(
            self.runner.num_blocks,
            settings.block_size,
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            settings.max_waiting + settings.max_num_seqs,
            settings.enable_prefix_caching,
        )

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, transformers'. Raises UserError if none was wanted."""
        if self.tokenizer is None:
            raise UserError("no tokenizer was loaded (skip_tokenizer_init); give token ids, and neither text nor stop")
        return self.tokenizer

    @property
    def kv_cache_tokens(self) -> int:
        """Positions that all pages together hold."""
        return self.runner.num_blocks * self.settings.block_size

    def requests(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        cache_salt: bytes = b"",
    ) -> list[Request]:
        """The `params.n` requests of a prompt, to be given to `add`. Touches nothing of the engine's state.

        Raises UserError for a prompt that is empty, too long or outside the vocabulary, and for parameters that this
        model cannot serve.
        """
        limit, vocab_size = self.max_model_len, self.model_config.vocab_size
        if not prompt_token_ids:
            raise UserError("prompt: is empty (no tokens)")
        if len(prompt_token_ids) >= limit:
            raise UserError(
                f"prompt: has {len(prompt_token_ids)} tokens; max_model_len = {limit} allows at most {limit - 1}"
            )
        if not all(0 <= token < vocab_size for token in prompt_token_ids):
            raise UserError(f"prompt: token ids must be between 0 and {vocab_size - 1}")
        params.check(vocab_size)
        if params.stop:
            self.get_tokenizer()
        room = limit - len(prompt_token_ids)
        grammar = None
        if params.structured_outputs is not None:
            grammar = compile_grammar(params.structured_outputs, self.get_tokenizer(), vocab_size, self._ends)
        return [
            Request(
                request_id=request_id,
                index=index,
                prompt=prompt,
                prompt_token_ids=prompt_token_ids,
                params=params,
                room=room if params.max_tokens is None else min(params.max_tokens, room),
                ends=self._ends,
                tokenizer=self.tokenizer,
                cache_salt=cache_salt,
                grammar=None if grammar is None else grammar.copy(),
            )
            for index in range(params.n)
        ]

    def add(self, request: Request) -> None:
        """Let a request wait for its place. Raises UserError for one that does not fit, WaitingQueueFull."""
        self.scheduler.add(request)

    @property
    def has_room(self) -> bool:
        """Whether another request may wait."""
        return self.scheduler.num_waiting < self.settings.max_waiting

    def abort(self, request_id: str) -> list[Request]:
        """End all requests of this id now; those that were still there."""
        return self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return self.scheduler.has_work

    def step(self) -> list[Request]:
        """One forward pass; the requests that got a token by it, some of which have ended with it."""
        step = self.scheduler.schedule()
        if not step:
            return []
        sequences = [_sequence(part, self.settings.block_size) for part in step]
        order = in_attention_order(sequences)
        logits_RV = self.runner.forward(StepBatch(tuple(sequences[i] for i in order)))
        sampling = [i for i in order if step[i].samples]
        sampled = self.sampler(logits_RV, [step[i].request for i in sampling]) if sampling else []
        by_place = dict(zip(sampling, sampled, strict=True))
        places = sorted(by_place)
        self.scheduler.update(step, [by_place[i] for i in places])
        return [step[i].request for i in places]

    def close(self) -> None:
        """End the other ranks' processes."""
        self.runner.close()


def _sequence(part: ScheduledRequest, block_size: int) -> SequenceStep:
    request, end = part.request, part.begin + part.count
    return SequenceStep(
        tuple(request.all_token_ids[part.begin : end]),
        part.begin,
        tuple(request.block_ids[: -(-end // block_size)]),
        part.samples,
    )
