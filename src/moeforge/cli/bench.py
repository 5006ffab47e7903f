"""`moeforge bench`: ours against the peers, in one run."""

from __future__ import annotations

import json as jsonlib
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from moeforge.cli.output import Json, emit, stderr_console
from moeforge.errors import UserError
from moeforge.files import write_whole


def train(
    against: Annotated[
        Literal["hf"], typer.Option(help="The peer: hf = transformers with its best expert implementation.")
    ] = "hf",
    model: Annotated[str | None, typer.Option(help="Dense model to upcycle; default: that of quickstart.")] = None,
    experts: Annotated[int, typer.Option(help="Experts of every layer, top-2.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Alternating runs of each side.")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Ratios to measure: ratio_bf16_pure, ratio_bf16_master, ratio_fp32; default all."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    json: Json = False,
) -> None:
    """Training steps a second of an upcycled model.

    Full optimiser steps of 4 x 256 tokens, ours and the peer's in alternating runs.
    """
    import torch

    from moeforge.bench.train import RATIOS, TrainBench
    from moeforge.checkpoint import open_checkpoint
    from moeforge.cli.quickstart import packaged_model
    from moeforge.data import python_corpus
    from moeforge.upcycle import UpcycleConfig, upcycle

    ratios = only or list(RATIOS)
    if unknown := [name for name in ratios if name not in RATIOS]:
        raise UserError(f"--only {unknown[0]}: must be one of {', '.join(RATIOS)}")
    console = stderr_console()
    with tempfile.TemporaryDirectory() as scratch:
        dense = open_checkpoint(model or packaged_model())
        # Without gate normalisation the directory is a Mixtral, which both sides read.
        made = upcycle(dense, Path(scratch) / "moe", UpcycleConfig(num_experts=experts, gate_norm=None, dtype="bf16"))
        tokenizer = dense.tokenizer()
        ids = [token for text in python_corpus(0)[0] for token in tokenizer(text, verbose=False)["input_ids"]]
        tokens = Path(scratch) / "tokens.pt"
        torch.save(torch.tensor(ids), tokens)
        bench = TrainBench(
            made.path, tokens, made.config, runs=runs, note=lambda line: console.print(line, soft_wrap=True)
        )
        result = bench.run(ratios)
    emit(result, json, "\n".join(f"{name}: {result[name]:.2f}" for name in ratios))
    if out is not None:  # last: what took minutes to measure is shown even if it cannot be written
        write_whole(out, jsonlib.dumps(result, indent=2) + "\n")


def calibrate(
    out: Annotated[Path, typer.Option(help="The TOML file to write.")],
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Devices that compute at once; default: all GPUs, or one process on all cores."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Also time the units of this model (preset, directory).")] = None,
    precision: Annotated[str, typer.Option(help="As model.precision: bf16, bf16_pure, fp32, fp64.")] = "bf16",
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    micro_batch_sequences: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 1,
    json: Json = False,
) -> None:
    """Measure this machine for the planner: matmuls, memory, links, and if wanted the units of a model.

    Nothing else should run meanwhile. On a CPU the cores and the memory are divided over the processes.
    """
    from moeforge.bench.calibrate import ModelCase, profile_toml
    from moeforge.bench.calibrate import calibrate as measure
    from moeforge.checkpoint import open_checkpoint
    from moeforge.config.presets import PRESETS, model_preset

    case = None
    if model is not None:
        preset = model in PRESETS and not Path(model).exists()
        config = model_preset(model) if preset else open_checkpoint(model).config
        case = ModelCase(config, precision, sequence_length, micro_batch_sequences)
    console = stderr_console()
    profile = measure(out.stem, processes, case, note=lambda line: console.print(line, soft_wrap=True))
    best = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in profile.peak_tflops.items())
    link = profile.intra_node
    emit(
        profile.model_dump(),
        json,
        f"{profile.devices} x {profile.memory_gbytes:.0f} GB, {profile.memory_gbytes_per_second:.3g} GB/s of memory\n"
        f"matmul at best: {best}\nlink: {link.gbytes_per_second:.3g} GB/s, {link.latency_us:.0f} us\n"
        f"written to {out}",
    )
    write_whole(out, profile_toml(profile))  # last: what took minutes to measure is shown even if it cannot be written


commands = {"train": train, "calibrate": calibrate}
