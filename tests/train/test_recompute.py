"""Recomputation by stage: every unit is computed as often as it has to be, in every schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeforge.config.schema import TrainConfig
from moeforge.train import prepare

SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"recompute_layers": [2, 0]},
    "interleaved-1f1b": {"chunks": 2, "recompute_layers": [1, 0, 1, 0]},
    "zero-bubble": {"recompute_layers": [1, 2]},
    "zbv": {"chunks": 2, "recompute_layers": [1, 0, 0, 1]},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recomputed_units_run_twice_and_others_once(
    schedule: str, source: Callable[..., Path], make_config: Callable[..., TrainConfig], run_ranks: Any
) -> None:
    """torch's split backward alone would recompute once for every weight."""
    parallel = {"pp": 2, "schedule": schedule} | SCHEDULES[schedule]
    config = make_config(source(num_layers=4), train={"micro_batch_sequences": 1}, parallel=parallel)

    def count(rank: int) -> tuple[Counter[str], set[str]]:
        trainer = prepare(config)
        counts: Counter[str] = Counter()
        for chunk in trainer.chunks:
            for name, unit in chunk.units():
                unit.register_forward_hook(lambda *_, of=name: counts.update([of]))
        trainer.train_step()
        return counts, {name for stage in trainer.mesh.layout.stages for name in stage.recompute}

    results = run_ranks(2, count)
    counts, recomputed = results[0][0] + results[1][0], results[0][1]
    assert len(counts) == 2 + 2 * 4 and recomputed
    assert counts == {name: 4 * (2 if name in recomputed else 1) for name in counts}
