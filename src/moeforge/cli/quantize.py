"""`moeforge quantize`: a checkpoint with FP8 weights, and what they cost in quality."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeforge.cli.output import Json, emit, jsonable, stderr_console
from moeforge.cli.text import read_text
from moeforge.config.quantization import Activations, QuantizationConfig, Scales, kept_by_user
from moeforge.errors import UserError
from moeforge.files import write_whole

if TYPE_CHECKING:
    from moeforge.checkpoint import Checkpoint
    from moeforge.config.model import ModelConfig
    from moeforge.evaluate import EvalResult

REPORT = "quantization_report.json"
_CALIBRATION_TOKENS = 16_384
_WORST = 10


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model directory, a GGUF file, a hub id or a preset.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model directory to write; must not exist or be empty.")],
    format: Annotated[Literal["fp8"], typer.Option(help="fp8: e4m3.")] = "fp8",
    scales: Annotated[
        Scales,
        typer.Option(help="One scale a block of 128 x 128 (what other engines read), a channel, or a tensor."),
    ] = "block128",
    activations: Annotated[
        Activations,
        typer.Option(
            help="What multiplies the weights: inputs as they are (none), or in e4m3 too, with a scale for each token "
            "(dynamic; with block128 for each 128 columns of it) or one found on a text (static; not with block128)."
        ),
    ] = "none",
    rounding: Annotated[
        Literal["nearest", "gptq"] | None,
        typer.Option(
            help="The nearest values, or those that GPTQ finds on a text: each column of a weight makes up for the "
            "errors of those before it; default: gptq, nearest for a model without a tokenizer."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A module that stays as it is, by its name or whole parts of it: o_proj, layers.0, ...; may be "
            "repeated. Embedding, head, routers and norms always stay.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="static, gptq: a UTF-8 text file; default: topics of Python's documentation."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to compare perplexities on; default: other topics, as moeforge eval takes."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to predict for that; default: all.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    json: Json = False,
) -> None:
    """Write a model with e4m3 weights, one weight in memory at a time, and report perplexity before and after.

    The report is also in OUT, as quantization_report.json.
    """
    if calibration is not None and activations != "static" and rounding == "nearest":
        raise UserError("--calibration: is only read with --activations static or --rounding gptq")
    words = None if text is None else read_text("--text", text)
    calibration_words = None if calibration is None else read_text("--calibration", calibration)
    config = QuantizationConfig(scales, activations)

    from moeforge.checkpoint import open_checkpoint, pick_device
    from moeforge.checkpoint.inference import pick_dtype
    from moeforge.checkpoint.writer import require_free_directory
    from moeforge.cli.progress import progress_bar
    from moeforge.evaluate import streamed_loss, text_windows
    from moeforge.quantize import calibrate, observe, quantize, require_unquantized

    require_free_directory(out)
    before = open_checkpoint(source)
    require_unquantized(before)
    config = dataclasses.replace(config, kept=kept_by_user(before.config, keep or ()))
    dtype, where = pick_dtype("auto", before), pick_device(device)
    window = min(1024, before.config.max_positions)
    if scales == "block128" and (odd := _no_blocks(before.config)):
        note = f"warning: {odd}: no multiple of 128; we read such blocks, other engines misread them or refuse"
        stderr_console().print(f"{note} (--scales channel and tensor have none)", highlight=False)
    if rounding is None:
        rounding = "gptq" if before.has_tokenizer or calibration is not None else "nearest"
    read, held_out = _tokens(before, calibration_words, words, activations == "static" or rounding == "gptq")

    def perplexity(checkpoint: Checkpoint, title: str) -> EvalResult | None:
        if held_out is None:
            return None
        batches = text_windows(checkpoint.config, held_out, window, max_tokens=max_tokens)
        with progress_bar(title, "units") as progress:
            return streamed_loss(checkpoint, batches, dtype, where, progress)

    inputs = observed = None
    if read is not None:
        window_read = min(window, len(read) - 1)
        whole = min(len(read) - 1, _CALIBRATION_TOKENS) // window_read * window_read
        batches = list(text_windows(before.config, read, window_read, window_read, whole))
        if activations == "static":
            with progress_bar("calibrating", "units") as progress:
                inputs = calibrate(before, batches, dtype, where, progress)
        if rounding == "gptq":
            observed = observe(before, batches, dtype, where)
    first = perplexity(before, "perplexity before")
    with progress_bar("quantising", "weights") as progress:
        made = quantize(before, out, config, inputs, progress, observed=observed)
    second = perplexity(open_checkpoint(out), "perplexity after")
    result: dict[str, Any] = {
        "path": made.path,
        "format": format,
        "scales": scales,
        "activations": activations,
        "rounding": rounding,
        "kept": config.kept,
        "bytes_before": made.bytes_before,
        "bytes_after": made.bytes_after,
        "perplexity_before": None if first is None else first.perplexity,
        "perplexity_after": None if second is None else second.perplexity,
        "perplexity_tokens": 0 if second is None else second.tokens,
        "largest_errors": made.worst(_WORST),
        "seconds": made.seconds,
    }
    write_whole(out / REPORT, json_format.dumps(jsonable(result), indent=2) + "\n")
    emit(result, json, lambda: _summary(result))


def _no_blocks(config: ModelConfig) -> str:
    """The sizes of matrices that are no multiples of a block."""
    moe, heads = config.moe, config.head_dim
    sizes = {"hidden_size": config.hidden_size, "query rows": config.num_heads * heads}
    sizes["key rows"] = config.num_kv_heads * heads
    if moe is not None:
        sizes["expert"] = moe.expert_size
    if moe is None or moe.layer_frequency > 1:
        sizes["feed-forward"] = config.ffn_size
    return ", ".join(f"{name} = {size}" for name, size in sizes.items() if size % 128)


def _tokens(
    checkpoint: Checkpoint, calibration: str | None, text: str | None, calibrated: bool
) -> tuple[list[int] | None, list[int] | None]:
    """Tokens to calibrate on, None where that is not `calibrated`, and to predict, None without a tokenizer.

    Without texts they are of Python's documentation. Raises UserError for a model without a tokenizer that is given a
    text or needs one, and for a text of fewer than two tokens.
    """
    from moeforge.cli.eval import python_topics

    if not checkpoint.has_tokenizer:
        if text is not None or calibrated:
            why = "--activations static, --rounding gptq: the calibration text" if calibrated else "--text: it"
            raise UserError(f"{why} cannot be read: {checkpoint.path} has no tokenizer")
        return None, None
    tokenizer = checkpoint.tokenizer()

    def encoded(option: str, words: str) -> list[int]:
        ids: list[int] = tokenizer(words, return_attention_mask=False, verbose=False)["input_ids"]
        if len(ids) < 2:
            raise UserError(f"{option}: the text has {len(ids)} tokens; at least two are needed")
        return ids

    read = None if calibration is None else encoded("--calibration", calibration)
    held_out = None if text is None else encoded("--text", text)
    if held_out is None or (calibrated and read is None):
        topics, others = python_topics(tokenizer)
        held_out, read = held_out or others, read or (topics if calibrated else None)
    return read, held_out


def _summary(result: dict[str, Any]) -> str:
    before, after = result["bytes_before"], result["bytes_after"]
    lines = [
        f"{result['path']}: e4m3, scales by {result['scales']}, activations {result['activations']}, "
        f"rounding {result['rounding']}",
        f"  weights      {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after ({after / before:.2f}x)",
    ]
    if result["perplexity_before"] is not None:
        first, second = result["perplexity_before"], result["perplexity_after"]
        tokens = result["perplexity_tokens"]
        lines.append(
            f"  perplexity   {first:.3f} before, {second:.3f} after ({second / first - 1:+.2%}), {tokens:,} tokens"
        )
    lines.append("  largest relative errors of weights")
    lines += [f"    {error:.4f}  {name}" for name, error in result["largest_errors"].items()]
    return "\n".join(lines)
