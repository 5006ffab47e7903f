"""One training run twice, with experts' products as ever and in FP8: `python -m moeforge.bench.fp8_training CONFIG`.

CONFIG is a training file; the two runs are run.dir + "-same" and run.dir + "-fp8", and differ in
`model.expert_precision` alone: same weights, data and order. What counts is how far the loss curves lie apart; without
a GPU that multiplies in FP8 the numbers are the same and the speed means nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from moeforge.config.schema import TrainConfig
from moeforge.config.toml import load_config
from moeforge.files import write_whole
from moeforge.train import prepare, read_result
from moeforge.train.metrics import read_rows

_LAST = 0.2
"""The share of the steps that the end of a run is judged by."""


def compare(config: TrainConfig) -> dict[str, Any]:
    """Loss of every step of both runs, held-out losses, and fp8's over the other's: the mean of the last fifth of the
    steps, the step furthest off, the last held-out loss."""
    same, fp8 = (_run(config, precision) for precision in ("same", "fp8"))
    ratios = [b / a for a, b in zip(same["loss"], fp8["loss"], strict=True)]
    last = max(1, round(_LAST * len(ratios)))
    return {
        "config": config.model_dump(mode="json"),
        "torch": torch.__version__,
        "same": same,
        "fp8": fp8,
        "loss_ratio": statistics.fmean(fp8["loss"][-last:]) / statistics.fmean(same["loss"][-last:]),
        "furthest_step_ratio": max(ratios, key=lambda ratio: abs(ratio - 1)),
        "eval_loss_ratio": None if fp8["eval_loss"] is None else fp8["eval_loss"] / same["eval_loss"],
    }


def _run(config: TrainConfig, precision: Literal["same", "fp8"]) -> dict[str, Any]:
    run = config.run.model_copy(update={"dir": f"{config.run.dir}-{precision}"})
    model = config.model.model_copy(update={"expert_precision": precision})
    trainer = prepare(config.model_copy(update={"run": run, "model": model}), resume="never")
    trainer.run()
    rows = [row for row in read_rows(trainer.run_dir / "metrics.jsonl") if "loss" in row]
    result = read_result(trainer.run_dir)
    return {
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        "eval_loss_before": result.eval_loss_before,
        "eval_loss": result.eval_loss,
        "tokens_per_second": result.tokens_per_second,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the result as JSON, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="training file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    text = json.dumps(compare(load_config(given.config, given.set)), indent=2)
    print(text)
    if given.out is not None:
        write_whole(given.out, text + "\n")


if __name__ == "__main__":
    main()
