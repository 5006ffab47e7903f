"""JSON schemas as grammars, by llguidance. Also a program, which tries one under limits of time and memory.

llguidance's own limits leave out some of its searches (`multipleOf` a million, patterns of lengths without a common
divisor), which then run for minutes where nothing can stop them. So a server tries a client's schema in a process of
its own first, which the kernel ends. As that has to start fast, nothing of moeforge is imported here.
"""

from __future__ import annotations

import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_SECONDS = 2
MEMORY_BYTES = 2**29  # of address space; what llguidance takes within the time is a third of it

# Without a bound, a model that is not sure what comes next can write spaces for ever.
_WHITESPACE = r"[ \n\r\t]{1,40}"
_LIMITS = LLParserLimits(
    step_lexer_fuel=50_000,  # the whole batch waits for each step: a few milliseconds
    step_max_items=20_000,
    precompute_large_lexemes=False,  # takes time that depends on the vocabulary, so trying would not tell
    verbose_errors=False,
)


def schema_matcher(schema: str, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher of the texts that follow a schema. It may be in an error state: see `matcher_error`."""
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # only this tells that a schema refers to itself alone
    return matcher


def matcher_error(matcher: LLMatcher) -> str | None:
    """What is wrong with a matcher, in one line."""
    if not matcher.is_error():
        return None
    message = matcher.get_error().partition("<backtrace>")[0].replace("<non-verbose/>", "")
    reason = " ".join(message.split())
    return {"NoExtensionBias": "nothing can satisfy it"}.get(reason, reason[:300])


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        print(matcher_error(schema_matcher(sys.stdin.read(), LLTokenizer("byte"))) or "")
    except ValueError as error:
        print(" ".join(str(error).split())[:300])


if __name__ == "__main__":
    _main()
