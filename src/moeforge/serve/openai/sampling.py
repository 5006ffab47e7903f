"""A request's parameters as the engine's `SamplingParams`."""

from __future__ import annotations

from collections.abc import Sequence

from moeforge.errors import UserError
from moeforge.serve.openai.errors import bad_request, of_user_error
from moeforge.serve.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from moeforge.serve.openai.settings import ServerSettings
from moeforge.serve.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutputsParams

MAX_VALUES = 2_000_000  # of an answer
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


def sampling_params(request: GenerationRequest, prompts: int, settings: ServerSettings) -> SamplingParams:
    """The parameters for each of `prompts` prompts. Raises ApiError (400) for values outside their range."""
    n = 1 if request.n is None else request.n
    if not 1 <= n * prompts <= settings.max_choices:
        raise bad_request(
            f"n: {n} continuations of {prompts} prompt{'s' if prompts > 1 else ''} are asked for; "
            f"1 to {settings.max_choices} are allowed in one request",
            "n",
        )
    stop = request.stop or ()
    # None leaves the defaults to SamplingParams itself.
    given = {
        name: value
        for name in (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "seed", "min_tokens", "ignore_eos",
        )
        if (value := getattr(request, name)) is not None
    }  # fmt: skip
    try:
        return SamplingParams(
            n=n,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            max_tokens=max_tokens(request),
            logprobs=_logprobs(request),
            logit_bias=_logit_bias(request),
            structured_outputs=_structured_outputs(request),
            **given,
        )
    except UserError as error:
        raise of_user_error(error) from error


def check_size(params: SamplingParams, rooms: Sequence[int]) -> None:
    """Raises ApiError (400) where an answer could hold more than the server will gather: tokens, and log-probabilities
    with each. `rooms`: for each prompt the most tokens that may follow."""
    tokens = sum(room if params.max_tokens is None else min(params.max_tokens, room) for room in rooms)
    values = params.n * tokens * (1 + (params.logprobs or 0))
    if values > MAX_VALUES:
        raise bad_request(
            f"max_tokens: the answer could hold {values} tokens and log-probabilities (prompts x n x max_tokens x "
            f"(1 + logprobs)); at most {MAX_VALUES} are allowed in one request",
            "max_tokens",
        )


def max_tokens(request: GenerationRequest) -> int | None:
    """The most new tokens; None: as many as fit. Raises ApiError where a chat gives both of its names a value."""
    if isinstance(request, ChatCompletionRequest):
        names = request.max_completion_tokens, request.max_tokens
        if None not in names and names[0] != names[1]:
            raise bad_request("max_tokens: differs from max_completion_tokens, its newer name; give one", "max_tokens")
        return names[1] if names[0] is None else names[0]
    return _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens


def _logprobs(request: GenerationRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        name, value = "logprobs", request.logprobs
    else:
        assert isinstance(request, ChatCompletionRequest)
        name, value = "top_logprobs", request.top_logprobs
        if not request.logprobs:
            if value:
                raise bad_request("top_logprobs: needs logprobs = true", name)
            return None
        value = value or 0
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise bad_request(f"{name} = {value}: must be between 0 and {MAX_LOGPROBS}", name)
    return value


def _logit_bias(request: GenerationRequest) -> dict[int, float] | None:
    if not request.logit_bias:
        return None
    for token in request.logit_bias:
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            raise bad_request("logit_bias: must map token ids to numbers between -100 and 100", "logit_bias")
    return {int(token): bias for token, bias in request.logit_bias.items()}


def _structured_outputs(request: GenerationRequest) -> StructuredOutputsParams | None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=wanted.schema_text())
