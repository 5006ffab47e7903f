from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from moeforge.kernels.triton import configs, tuning
from moeforge.kernels.triton.configs import BUCKETS, Config, default_config
from moeforge.kernels.triton.tuning import KINDS, candidates, tune

SLOW, FAST, LARGE = Config(16, 32, 4, 2), Config(16, 16, 4, 2), Config(32, 16, 4, 2)


def test_candidates_are_few_and_include_the_default() -> None:
    for kind in KINDS:
        for rows in BUCKETS:
            found = list(candidates(kind, rows))
            assert len(set(found)) == len(found) <= 24
            assert all(config.block_n >= 64 and config.block_m >= 16 for config in found)
            assert default_config(kind, rows) in found


def test_the_fastest_that_fits_is_chosen_and_read_back(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def do_bench(call: Callable[[], Tensor], **_: Any) -> float:
        assert call().isfinite().all()
        calls.append(call)
        return {0: 2.0, 1: 1.0}[len(calls) % 2]  # in turn: FAST, SLOW

    def candidates(kind: str, rows: int) -> list[Config]:
        return [FAST, SLOW, LARGE]

    def refuse_large(call: Callable[[Config], Tensor], config: Config) -> float:
        if config == LARGE:
            raise OutOfResources(1, 0, "shared memory")
        return milliseconds(call, config)

    milliseconds = tuning._milliseconds
    monkeypatch.setattr(tuning, "do_bench", do_bench)
    monkeypatch.setattr(tuning, "candidates", candidates)
    monkeypatch.setattr(tuning, "_milliseconds", refuse_large)
    monkeypatch.setattr(tuning, "SHAPES", ((2, 16, 32),))
    monkeypatch.setattr(tuning, "BUCKETS", (16,))
    table = tune(torch.device(device))
    assert table == {kind: {16: FAST._asdict()} for kind in KINDS}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "_table", configs._table.__wrapped__)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    path = configs.table_path(name)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(table))
    assert configs.config("weight-only", 16, torch.device(device)) == FAST
