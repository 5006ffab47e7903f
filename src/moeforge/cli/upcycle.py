"""`moeforge upcycle`: a dense checkpoint becomes a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moeforge.cli.output import Json, emit
from moeforge.cli.text import read_text
from moeforge.errors import UserError

# As in moeforge.upcycle.config, which imports torch.
Method = Literal["copy", "noise", "drop", "virtual-group"]
Scaling = Literal["down", "cube-root", "none"]
Shared = Literal["average", "first"]
StoredType = Literal["keep", "bf16", "fp32"]


def command(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="Dense model: directory, .gguf file, hub id or preset."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model directory to write; must not exist or be empty.")],
    experts: Annotated[int, typer.Option(help="Experts in a layer of the result.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that a token uses.")] = 2,
    method: Annotated[
        Method,
        typer.Option(
            help="Experts are copies; copies with noise; copies partly re-initialised (drop); or slices of a copy "
            "(virtual-group). See docs/upcycling.md."
        ),
    ] = "copy",
    gate_norm: Annotated[
        str,
        typer.Option(help="Lambda of the gating-logit normalisation, or off; auto is 1.0 from 3 experts on."),
    ] = "auto",
    learn_gate_norm: Annotated[
        bool, typer.Option("--learn-gate-norm", help="Make lambda a parameter of every layer, begun at --gate-norm.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of routers, noise and re-initialisation.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare logits with those of the dense model afterwards.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="Text file to verify on, instead of a built-in one.")] = None,
    granularity: Annotated[
        int | None, typer.Option(help="virtual-group: experts cut from one copy; default: top-k.")
    ] = None,
    scaling: Annotated[
        Scaling,
        typer.Option(help="Weights scaled to keep the output: down is exact, cube-root as published, approximate."),
    ] = "down",
    renormalize: Annotated[
        bool, typer.Option(help="Weights of the chosen experts sum to 1 (needed to preserve the function).")
    ] = True,
    layer_frequency: Annotated[int, typer.Option(help="Experts in every n-th layer.")] = 1,
    noise_std: Annotated[
        float, typer.Option(help="noise: its standard deviation, as a share of each matrix's.")
    ] = 0.01,
    noise_fraction: Annotated[float, typer.Option(help="noise: share of the units that get it.")] = 1.0,
    drop_ratio: Annotated[float, typer.Option(help="drop: share of the units drawn anew.")] = 0.5,
    donor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="A further dense model of SRC's shape, which gives an equal block of experts; may be repeated.",
        ),
    ] = None,
    shared: Annotated[
        Shared, typer.Option(help="Several donors: where all weights but the experts' come from.")
    ] = "average",
    dtype: Annotated[StoredType, typer.Option(help="Type to store; keep turns GGUF weights into fp32.")] = "keep",
    json: Json = False,
) -> None:
    """Turn a dense checkpoint into a mixture of experts, layer by layer. Goes on where it was interrupted."""
    if text is not None and not verify:
        raise UserError("--text: is only read with --verify")
    words = None if text is None else read_text("--text", text)

    from moeforge.checkpoint import open_checkpoint
    from moeforge.cli.progress import progress_bar
    from moeforge.upcycle import UpcycleConfig, sample_tokens, upcycle
    from moeforge.upcycle import verify as compare

    config = UpcycleConfig(
        num_experts=experts, top_k=top_k, method=method, gate_norm=_gate_norm(gate_norm),
        gate_norm_learned=learn_gate_norm, seed=seed,
        layer_frequency=layer_frequency, granularity=granularity, scaling=scaling, renormalize=renormalize,
        noise_std=noise_std, noise_fraction=noise_fraction, drop_ratio=drop_ratio, shared=shared, dtype=dtype,
    )  # fmt: skip
    donors = [open_checkpoint(name) for name in (source, *(donor or ()))]
    config.model_config(donors[0].config)
    tokens = sample_tokens(donors[0], words) if verify else None
    with progress_bar("upcycling", "bytes") as progress:
        made = upcycle(donors, out, config, progress)
    result: dict[str, Any] = {
        "path": made.path,
        "params_total": made.params_total,
        "params_active": made.params_active,
        "seconds": made.seconds,
        "peak_anonymous_bytes": made.peak_anonymous_bytes,
        "resumed": made.resumed,
    }
    check = None
    if tokens is not None:
        units = made.config.num_layers + 1
        with progress_bar("verifying", "layers") as progress:
            check = compare(
                donors[0],
                open_checkpoint(out),
                tokens,
                config.preserves_function(len(donors)),
                progress=lambda done: progress(done, units),
            )
        result |= {
            "preserves_function": check.preserves_function,
            "max_logit_diff": check.max_logit_diff,
            "rounding_bound": check.bound,
            "argmax_agreement": check.argmax_agreement,
            "layer_max_diff": check.layer_max_diff,
            "verified_tokens": check.tokens,
        }
    emit(result, json, lambda: _summary(made, check))
    if check is not None:
        check.require()


def _gate_norm(value: str) -> Any:
    if value in ("auto", "off"):
        return None if value == "off" else value
    try:
        return float(value)
    except ValueError:
        raise UserError(f"--gate-norm = {value}: must be a positive number, off or auto") from None


def _summary(made: Any, check: Any) -> str:
    moe, experts = made.config.moe, made.config.moe.num_experts
    norm = "off" if moe.gate_norm is None else f"{moe.gate_norm:g}"
    peak = made.peak_anonymous_bytes
    lines = [
        f"{made.path}: {experts} experts, top-{moe.top_k}, gate normalisation {norm}",
        f"  parameters   {made.params_total / 1e6:,.1f} M, {made.params_active / 1e6:,.1f} M active a token",
        f"  took         {made.seconds:.1f} s" + ("" if peak is None else f", peak {peak / 1e6:,.0f} MB of memory"),
    ]
    if check is not None:
        verdict = f"differ by at most {check.max_logit_diff:.2g} (largest {check.max_logit:.3g})"
        meaning = (
            f"rounding; the bound is {check.bound:.2g}"
            if check.preserves_function and check.passed
            else "this method does not preserve the function"
            if not check.preserves_function
            else f"more than rounding, {check.bound:.2g}"
        )
        lines.append(f"  logits       {verdict}: {meaning}")
        lines.append(f"  same choice  of the next token for {check.argmax_agreement:.1%} of {check.tokens} tokens")
    return "\n".join(lines)
