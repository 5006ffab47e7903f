"""What a request returns, in vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class Sampled(NamedTuple):
    """A drawn token. Where logprobs were asked for: its log-probability, and those of the likeliest tokens by token,
    falling, the drawn one always among them (all of the model's own distribution: before temperature and penalties)."""

    token: int
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None


@dataclass(frozen=True)
class CompletionDelta:
    """What one step adds to one continuation (number `index` of n). `text` may be empty, and `sampled` too.

    `finish_reason` "stop": an end token or a stop string, which `stop_reason` names (None for the model's own end
    token); "length"; "abort"; None while running.
    """

    index: int
    text: str
    sampled: tuple[Sampled, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation. `finish_reason` and `stop_reason` as in `CompletionDelta`.

    `token_ids` includes the token that ended it; `text` holds neither special tokens nor the stop string. `logprobs`:
    one entry a token, where asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: list[Sampled] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuations. `prompt` is None where the request came as token ids."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return all(output.finish_reason is not None for output in self.outputs)
