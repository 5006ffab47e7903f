"""`moeforge eval MODEL`: loss and perplexity on held-out text."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from moeforge.cli.output import Json, emit
from moeforge.cli.text import read_text
from moeforge.errors import RunError

# What training with the defaults (run.seed, data.holdout_fraction) holds out of the running Python's topics.
_SEED, _HOLDOUT_FRACTION = 0, 0.01


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, a GGUF file, a hub id or a preset.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text file; default: held-out topics of Python's documentation."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a window; default: 1024, or the model's positions if fewer.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to predict; default: all.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Compute in auto (as stored; bf16 for GGUF), bf16, fp32 or fp64.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    json: Json = False,
) -> None:
    """Mean loss (nats a token) and perplexity of a model on a text, read in half-overlapping windows."""
    from moeforge.checkpoint import open_checkpoint
    from moeforge.checkpoint.inference import load_for_inference
    from moeforge.evaluate import held_out_loss, text_tokens, text_windows

    words = None if text is None else read_text("--text", text)
    checkpoint = open_checkpoint(model)
    window = min(1024, checkpoint.config.max_positions) if sequence_length is None else sequence_length
    tokenizer = checkpoint.tokenizer()
    tokens = python_topics(tokenizer)[1] if words is None else text_tokens(tokenizer, words)
    batches = text_windows(checkpoint.config, tokens, window, max_tokens=max_tokens)  # or refused, before loading
    result = held_out_loss(load_for_inference(checkpoint, dtype, device), batches)
    if not math.isfinite(result.loss):
        raise RunError(f"{model}: the loss is {result.loss}; the weights are damaged or overflow in this dtype")
    human = f"loss {result.loss:.4f}, perplexity {result.perplexity:.3f} over {result.tokens:,} tokens"
    emit(dataclasses.asdict(result), json, human)


def python_topics(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The documentation topics of the running Python, one after another: those trained on, and those held out."""
    from moeforge.data import build_cache, python_source

    with tempfile.TemporaryDirectory(prefix="moeforge-eval-") as directory:
        (cache,) = build_cache(
            [python_source(max_bytes=0)], tokenizer, directory, holdout_fraction=_HOLDOUT_FRACTION, seed=_SEED
        )
        return list(map(int, cache.train.tokens)), list(map(int, cache.held_out.tokens))
