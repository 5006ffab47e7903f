"""A model spread over ranks in any way is written as one process writes it, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import load_part, open_checkpoint, save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import RunError, UserError
from moeforge.layout import Layout, Stage, build_layout
from moeforge.model import Transformer
from moeforge.parallel import Mesh
from moeforge.parallel.gather import save_distributed
from moeforge.parallel.parameters import parameter_parts

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
MOE = MoEConfig(5, 2, 7, gate_norm=1.0, gate_norm_learned=True, router_bias=True, layer_frequency=2)
CONFIG = ModelConfig(
    vocab_size=37, hidden_size=12, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=4, ffn_size=20,
    qkv_bias=True, output_bias=True, qk_norm="full", moe=MOE,
)  # fmt: skip
TIED = replace(CONFIG, tie_embeddings=True, moe=None)
CASES: dict[str, tuple[ModelConfig, dict[str, Any], torch.dtype]] = {
    "one": (CONFIG, {}, torch.float32),
    "dp2": (CONFIG, {"dp": 2}, torch.bfloat16),
    "tp2 pp2": (CONFIG, {"tp": 2, "pp": 2}, torch.float32),
    "tp4, empty parts": (CONFIG, {"tp": 4}, torch.bfloat16),
    "ep2 etp2": (CONFIG, {"dp": 2, "tp": 2, "ep": 2, "etp": 2}, torch.float64),
    "tied, pp3": (TIED, {"pp": 3, "stages": [2.5, 0, 1.5]}, torch.float32),
}


def write_model(directory: Path, config: ModelConfig, dtype: torch.dtype) -> Path:
    model = Transformer(config)
    torch.manual_seed(0)
    model.reset_parameters(0.3)
    save_model(model, directory, dtype=dtype)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def layout_of(case: str) -> Layout:
    config, sizes, _ = CASES[case]
    layout = build_layout(config, **sizes)
    if "stages" in sizes:  # the first rank holds nothing, the embedding lies elsewhere
        units = 2 * config.num_layers + 2
        layout = replace(layout, stages=(Stage(0, 0), Stage(0, 5), Stage(5, units)))
    return layout


def spread(case: str, source: Path) -> tuple[Mesh, list[Transformer]]:
    config, _, dtype = CASES[case]
    mesh = Mesh.create(layout_of(case), CPU)
    checkpoint, chunks = open_checkpoint(source), []
    for stage in mesh.stages:
        with torch.device("meta"):
            chunk = Transformer(config, mesh.layout, stage, mesh.at.tp, mesh.at.expert_rank)
        parts = parameter_parts(config, mesh.layout, stage, mesh.at.tp, mesh.at.expert_rank)
        chunk.load_state_dict(load_part(checkpoint, parts, dtype), assign=True)
        chunks.append(chunk)
    return mesh, chunks


def _save(rank: int, case: str, source: Path, out: Path) -> Path:
    mesh, chunks = spread(case, source)
    return save_distributed(mesh, chunks, out, tokenizer_from=open_checkpoint(source))


@pytest.mark.parametrize("case", CASES)
def test_written_as_by_one_process(run_ranks: RunRanks, tmp_path: Path, case: str) -> None:
    config, _, dtype = CASES[case]
    source, out = write_model(tmp_path / "source", config, dtype), tmp_path / "out"
    assert run_ranks(layout_of(case).world_size, _save, case, source, out) == [out] * layout_of(case).world_size
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def _refused(rank: int, source: Path, out: Path, kind: str) -> tuple[str, str]:
    import moeforge.checkpoint.load as load

    mesh, chunks = spread("tp2 pp2", source)
    if rank == 0 and kind == "disk":
        count = 0

        class Full(load.ShardWriter):
            def add(self, name: str, tensor: torch.Tensor) -> None:
                nonlocal count
                count += 1
                if count == 9:
                    raise RunError("the disk is full")
                super().add(name, tensor)

        load.ShardWriter = Full  # type: ignore[misc]
    try:
        save_distributed(mesh, chunks, out)
    except (UserError, RunError) as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


def test_what_the_first_rank_meets_is_raised_on_all(run_ranks: RunRanks, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", CONFIG, torch.float32)
    messages = run_ranks(4, _refused, source, source, "in use")
    assert (
        messages
        == [("UserError", f"{source}: already exists and is not empty; name another directory or remove it")] * 4
    )
    assert run_ranks(4, _refused, source, tmp_path / "out", "disk") == [("RunError", "the disk is full")] * 4
    assert not (tmp_path / "out").exists()
