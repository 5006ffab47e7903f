"""`moeforge generate MODEL --prompt TEXT`: continue a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.output import Json, emit

if TYPE_CHECKING:
    from moeforge.serve import RequestOutput


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, a GGUF file, a hub id or a preset.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, through the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token; 1 samples the model's own distribution.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens whose probabilities sum to this.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many of the likeliest tokens; 0 is all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Sample among tokens at least this share as likely as the likeliest.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed samples the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Compute in auto (as stored; bf16 for GGUF), bf16, fp32 or fp64.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer together; default: the model's positions.")
    ] = None,
    json: Json = False,
) -> None:
    """Continue a prompt; greedy unless --temperature is given."""
    from moeforge.serve import LLM, SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop or (),
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    llm = LLM(model, dtype=dtype, device=device, max_model_len=max_model_len)
    llm.get_tokenizer()
    printer = None if json or not sys.stdout.isatty() else _Printer()
    if chat:
        (output,) = llm.chat([{"role": "user", "content": text}], params, printer)
    else:
        (output,) = llm.generate([text], params, printer)
    completion = output.outputs[0]
    result = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_tokens": len(output.prompt_token_ids),
        "finish_reason": completion.finish_reason,
    }
    emit(result, json, completion.text if printer is None else "")


class _Printer:
    """Prints what is new of a text after each step."""

    def __init__(self) -> None:
        self._printed = 0

    def __call__(self, outputs: list[RequestOutput]) -> None:
        text = outputs[0].outputs[0].text
        print(text[self._printed :], end="", flush=True)
        self._printed = len(text)
