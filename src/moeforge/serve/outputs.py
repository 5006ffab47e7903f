"""What a request returns, in vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation. `finish_reason` "stop": an end token or a stop string; "length"; None while running.

    `token_ids` includes the token that ended it; `text` holds neither special tokens nor the stop string.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuation. `prompt` is None where the request came as token ids."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return all(output.finish_reason is not None for output in self.outputs)
