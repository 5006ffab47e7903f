"""The bodies of requests, in OpenAI's names, and vLLM's where it adds something.

What is not declared here is refused by name: an ignored parameter is a wrong answer that nobody notices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from moeforge.serve.openai.errors import bad_request, of_validation, shown

# Parameters of OpenAI or vLLM that this server does not have, with the values that mean "without it".
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "chat_template": (), "documents": ([],), "echo": (False,),
    "function_call": ("none", "auto"), "functions": ([],), "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0), "lora_request": (), "modalities": (["text"],), "moderation": (),
    "parallel_tool_calls": (True, False), "prediction": (), "priority": (0,), "prompt_cache_retention": (),
    "prompt_logprobs": (), "prompt_embeds": (), "reasoning_effort": ("none",), "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "store": (False,), "suffix": ("",),
    "tool_choice": ("none", "auto"), "tools": ([],), "truncate_prompt_tokens": (), "use_beam_search": (False,),
    "verbosity": (), "web_search_options": (),
}  # fmt: skip
_NO_TEXT = ("image_url", "input_audio", "video_url", "file", "refusal")
# Bookkeeping of OpenAI's service, where doing nothing is right.
HARMLESS = ("metadata", "prompt_cache_key", "safety_identifier", "user")

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], body: bytes) -> Model:
    """A request body as `model`. Raises ApiError (400): no JSON, too deep, unknown, unsupported or wrong values."""
    try:
        # Not json.loads: this parser has a limit of depth and refuses NaN, half characters and bad UTF-8 itself.
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"body: is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise bad_request("body: must be a JSON object")
    for name in HARMLESS:
        data.pop(name, None)
    for name in [name for name in UNSUPPORTED if name in data]:
        value = data.pop(name)
        if value is not None and not any(value == fine and type(value) is type(fine) for fine in UNSUPPORTED[name]):
            what = "chat_template: templates in requests are" if name == "chat_template" else f"{name}: is"
            raise bad_request(f"{what} not supported by this server", name, "not_supported")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise of_validation(error) from error


class Strict(BaseModel):
    """No conversions, no unknown fields, only finite numbers; stops at the first fault, however many there are."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    also: ClassVar[tuple[str, ...]] = ()  # fields that may be there but must be null or empty

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, value in data.items():
                if name in cls.also and value not in (None, [], {}):
                    raise PydanticCustomError("not_supported", "{name} is not supported by this server", {"name": name})
                if name not in cls.model_fields and name not in cls.also and not _is_alias(cls, name):
                    raise PydanticCustomError("unknown_field", "unknown field {name}", {"name": repr(shown(name))})
        return data


def _is_alias(model: type[BaseModel], name: str) -> bool:
    return any(field.alias == name for field in model.model_fields.values())


def _at_most(count: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise PydanticCustomError("too_many", "at most {count} are allowed", {"count": count})
        return value

    return BeforeValidator(check)


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the usage."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchemaFormat(Strict):
    """A named JSON schema; `strict` needs no asking for."""

    name: str = "schema"
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def schema_text(self) -> str:
        """The schema as JSON. Raises ApiError where there is none, or it holds what JSON does not have."""
        if self.json_schema is None:
            raise bad_request("response_format: json_schema is missing", "response_format")
        try:
            return json.dumps(self.json_schema.schema_, allow_nan=False)
        except ValueError as error:
            raise bad_request("response_format: the schema holds a number out of range", "response_format") from error


class GenerationRequest(Strict):
    """What both endpoints take. None is OpenAI's default."""

    model: str | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, _at_most(1024)] = None
    seed: Int | None = None
    stop: Annotated[str | list[str] | None, _at_most(16)] = None
    stop_token_ids: Annotated[list[Int] | None, _at_most(256)] = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` is checked by `prompts()`, which is quicker and kinder than a union of lists."""

    prompt: Any
    logprobs: Int | None = None
    add_special_tokens: bool | None = None

    def prompts(self, most: int) -> list[str | list[int]]:
        """The prompts, at most `most`. Raises ApiError for anything else than OpenAI's four forms."""
        value = self.prompt
        if isinstance(value, str) or (isinstance(value, list) and value and _are_ids(value)):
            value = [value]
        if not isinstance(value, list):
            raise bad_request("prompt: must be a text, token ids, or a list of either", "prompt")
        if not 1 <= len(value) <= most:
            raise bad_request(f"prompt: {len(value)} prompts; 1 to {most} are allowed in one request", "prompt")
        for i, one in enumerate(value):
            if not isinstance(one, str) and not (isinstance(one, list) and _are_ids(one)):
                raise bad_request(f"prompt.{i}: must be a text or a list of token ids", "prompt")
        return value


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart] | None, _at_most(1000)] = None
    name: str | None = None
    also: ClassVar[tuple[str, ...]] = ("refusal", "annotations", "audio", "function_call", "tool_calls")

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if data.get("role") in ("tool", "function"):
                raise PydanticCustomError("not_supported", "tools are not supported by this server")
            parts = data.get("content")
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict) and part.get("type") in _NO_TEXT:
                    raise PydanticCustomError("not_supported", "only text content is supported by this server")
        return data

    def text(self) -> str:
        """The content; parts are lines."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast(), _at_most(10_000)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str] | None, _at_most(32)] = None

    def conversation(self) -> list[dict[str, str]]:
        """What the chat template reads. Raises ApiError where there is nothing to answer."""
        if not self.messages:
            raise bad_request("messages: must not be empty", "messages")
        conversation = []
        for i, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise bad_request(f"messages.{i}.content: is missing", "messages")
            # Templates know OpenAI's newer name for it rarely.
            role = "system" if message.role == "developer" else message.role
            turn = {"role": role, "content": message.text()}
            conversation.append(turn if message.name is None else turn | {"name": message.name})
        return conversation
