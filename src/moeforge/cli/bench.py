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


commands = {"train": train}
