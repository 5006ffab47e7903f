"""What a request asks of the sampler; names and defaults are vLLM's."""

from __future__ import annotations

import json as jsonlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeforge.errors import UserError

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing by it would only overflow
MAX_N = 128
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256
MAX_STOP_TOKENS = 256
MAX_BIASES = 1024
MAX_SCHEMA_BYTES = 65536


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the text must be; exactly one of these.

    json         a JSON schema: its text, or the object
    json_object  any JSON object

    Raises UserError for neither or both, and for a schema that is not JSON, or is larger than 64 KiB.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise _refused("structured_outputs.json_object", self.json_object, "true or false")
        if (self.json is not None) == self.json_object:
            raise UserError("structured_outputs: must have exactly one of json (a schema) and json_object (true)")
        if self.json is not None:
            self._checked()

    @property
    def schema(self) -> str:
        """The JSON schema as text."""
        if self.json is None:
            return '{"type": "object"}'
        return self.json if isinstance(self.json, str) else jsonlib.dumps(self.json)

    def _checked(self) -> None:
        try:
            # ASCII: lone surrogates stay escapes. The size comes first, as reading is what it bounds.
            text = self.json if isinstance(self.json, str) else jsonlib.dumps(self.json, allow_nan=False)
            size = len(text.encode(errors="surrogatepass"))
            if size > MAX_SCHEMA_BYTES:
                raise UserError(
                    f"structured_outputs: the JSON schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are allowed"
                )
            read = jsonlib.loads(text)
        except RecursionError as error:
            raise UserError("structured_outputs: the JSON schema is nested too deeply") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"structured_outputs: the JSON schema is not JSON ({error})") from error
        if not isinstance(read, dict):
            raise UserError("structured_outputs: the JSON schema must be an object")
        if "x-guidance" in read:  # the grammar library's own switch, which may weaken the schema
            raise UserError("structured_outputs: the JSON schema must not have the key x-guidance")


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request.

    n                   continuations of the prompt, each drawn on its own: 1 to 128
    temperature         0 is greedy; at most 100
    top_k               only the k likeliest tokens; 0 or -1 is all
    top_p               only the likeliest tokens whose probabilities first sum to top_p
    min_p               only tokens at least min_p times as likely as the likeliest
    presence_penalty    taken from the logits of tokens that were generated already: -2 to 2
    frequency_penalty   the same, as often as they were generated: -2 to 2
    repetition_penalty  divides the positive logits of tokens of prompt and continuation, and multiplies their negative
                        ones: 0.01 to 100
    seed                the same seed gives the same tokens, whatever else is in the batch; None is random
    stop                strings that end the text (and are not part of it): at most 16, of at most 256 characters. The
                        one that is complete first ends it; of those complete at once, the longest.
    stop_token_ids      tokens that end the text beside the model's own end tokens
    ignore_eos          go on after the model's own end tokens
    max_tokens          most tokens to generate; None: as many as the model's length allows
    min_tokens          no end token before so many tokens, nor a stop string within them
    logprobs            the log-probability of each token, and of the k likeliest in its place: 0 to 20. They are the
                        model's own: before all that is listed here.
    logit_bias          added to the logits of single tokens, by token id: -100 to 100
    structured_outputs  what the text must be. When nothing can follow, the request ends, also before min_tokens.

    What changes the logits applies in this order: the grammar of structured_outputs and min_tokens, logit_bias,
    repetition_penalty, frequency_penalty and presence_penalty, temperature, min_p, top_k, top_p. The last three each
    work on what the ones before them left; the likeliest token always stays.

    Raises UserError for a value of the wrong type or outside its range. Token ids have no upper bound until `check`.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._number("temperature", 0, MAX_TEMPERATURE, f"between 0 (greedy) and {MAX_TEMPERATURE:g}")
        self._number("top_p", 0, 1, "above 0 and at most 1", above=True)
        self._number("min_p", 0, 1)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        self._number("repetition_penalty", 0.01, 100)
        self._integer("n", 1, MAX_N)
        self._integer("top_k", -1, None, "a positive integer, or 0 or -1 for all tokens")
        self._integer("min_tokens", 0)
        self._integer("max_tokens", 1, optional=True)
        self._integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._integer("seed", -(2**63), 2**64 - 1, "an integer of 64 bits", optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise _refused("ignore_eos", self.ignore_eos, "true or false")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens = {self.min_tokens}: must be at most max_tokens = {self.max_tokens}")
        object.__setattr__(self, "stop", self._stop_strings())
        object.__setattr__(self, "stop_token_ids", self._stop_tokens())
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", self._biases(self.logit_bias))
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise _refused("structured_outputs", self.structured_outputs, "a StructuredOutputsParams")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        """Whether top_k, top_p or min_p exclude tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        """Whether tokens that came before are changed."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check(self, vocab_size: int) -> None:
        """Raises UserError for token ids that the model does not have."""
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in tokens or ():
                if token >= vocab_size:
                    raise UserError(f"{name}: has token {_shown(token)}; must be between 0 and {vocab_size - 1}")

    def _number(self, name: str, least: float, most: float, allowed: str = "", above: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value, least, most) or (above and value <= least):
            raise _refused(name, value, allowed or f"between {least:g} and {most:g}")
        object.__setattr__(self, name, float(value))

    def _integer(
        self, name: str, least: int, most: int | None = None, allowed: str = "", optional: bool = False
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_integer(value) or value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"between {least} and {most}"
            raise _refused(name, value, allowed or f"an integer, {bounds}")

    def _stop_strings(self) -> tuple[str, ...]:
        given = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(given, Sequence) or len(given) > MAX_STOP_STRINGS:
            raise _refused("stop", given, f"a string or a list of at most {MAX_STOP_STRINGS}")
        for text in given:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise _refused("stop", given, f"strings of 1 to {MAX_STOP_CHARACTERS} characters")
        return tuple(given)

    def _stop_tokens(self) -> tuple[int, ...]:
        given = self.stop_token_ids or ()
        fine = isinstance(given, Sequence) and not isinstance(given, str) and len(given) <= MAX_STOP_TOKENS
        if not fine or not all(_is_integer(token) and token >= 0 for token in given):
            raise _refused("stop_token_ids", given, f"a list of at most {MAX_STOP_TOKENS} token ids")
        return tuple(given)

    @staticmethod
    def _biases(given: Any) -> dict[int, float]:
        if not isinstance(given, Mapping) or len(given) > MAX_BIASES:
            raise _refused("logit_bias", given, f"a map of at most {MAX_BIASES} token ids to numbers")
        for token, bias in given.items():
            if not _is_integer(token) or token < 0:
                raise UserError(f"logit_bias: has the key {_shown(token)}; must be a token id")
            if not _is_number(bias, -100, 100):
                raise UserError(f"logit_bias: token {_shown(token)} has {_shown(bias)}; must be between -100 and 100")
        return {token: float(bias) for token, bias in given.items()}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, least: float, most: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and least <= value <= most  # never true of NaN


def _shown(value: Any) -> str:
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # an integer of too many digits to print
        return "a huge number"


def _refused(name: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{name} = {_shown(value)}: must be {allowed}")
