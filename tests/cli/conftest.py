"""Tiny models, a corpus and a training file; one command line refused, with nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeforge.checkpoint import ShardWriter, canonical_shapes
from moeforge.cli.app import main
from moeforge.config.model import ModelConfig, MoEConfig

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "ffn_size": 32, "max_positions": 64, "eos_token_ids": (1,),
}  # fmt: skip
TEXT = " ".join(f"w{i * 7 % 60}" for i in range(600))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tokenizer(directory: Path, words: int = 60) -> None:
    """A tokenizer of `words` whole words and two special tokens."""
    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(directory)


def write_model(directory: Path, shard_bytes: int = 10**9, **changes: Any) -> Path:
    config = ModelConfig(**{**SIZES, **changes})
    rng = torch.Generator().manual_seed(0)
    writer = ShardWriter(directory, config, shard_bytes)
    for name, shape in canonical_shapes(config).items():
        writer.add(name, torch.randn(shape, generator=rng) * 0.1 + ("norm" in name))
    write_tokenizer(writer.finish())
    return directory


@pytest.fixture(scope="session")
def _models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    moe = MoEConfig(num_experts=4, top_k=2, expert_size=32, gate_norm=1.0)
    return {
        "dense": write_model(root / "dense"),
        "sharded": write_model(root / "sharded", shard_bytes=20_000),
        "moe": write_model(root / "moe", moe=moe),
        "long": write_model(root / "long", max_positions=256),
    }


@pytest.fixture
def model(_models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """`model()`: a dense model's directory to damage; `model("sharded")`, `model("moe")`: others."""

    def copy(kind: str = "dense") -> Path:
        return Path(shutil.copytree(_models[kind], tmp_path / kind))

    return copy


@pytest.fixture
def save_tokenizer() -> Callable[..., None]:
    """`save_tokenizer(directory, words=n)`: gives it a tokenizer of n + 2 tokens."""
    return write_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A corpus that the models' tokenizer knows."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def train_file(tmp_path: Path, text: Path) -> Callable[..., Path]:
    """`train_file(model, section={...})`: a training file of four steps, its run in tmp_path/run."""

    def write(path: Path | str, **sections: dict[str, Any]) -> Path:
        data: dict[str, dict[str, Any]] = {
            "run": {"dir": str(tmp_path / "run"), "tensorboard": False},
            "model": {"path": str(path), "precision": "fp32", "device": "cpu"},
            "data": {
                "train": [{"path": str(text)}], "sequence_length": 16, "holdout_fraction": 0.2,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {"steps": 4, "batch_sequences": 2, "micro_batch_sequences": 2},
            "schedule": {"warmup_steps": 1},
            "checkpoint": {"every": 2},
        }  # fmt: skip
        for section, values in sections.items():
            data.setdefault(section, {}).update(values)
        file = tmp_path / "config.toml"
        file.write_text(tomli_w.dumps(data))
        return file

    return write


@pytest.fixture
def command(tmp_path: Path, text: Path, train_file: Callable[..., Path]) -> Callable[..., list[str]]:
    """`command(verb, model)`: the arguments with which a verb would work if the model were whole."""

    def arguments(verb: str, path: Path | str) -> list[str]:
        return [
            verb,
            *{
                "upcycle": [str(path), str(tmp_path / "out"), "--experts", "4"],
                "train": [str(train_file(path))],
                "eval": [str(path), "--text", str(text), "--device", "cpu"],
                "generate": [str(path), "--prompt", "w1 w2", "--max-tokens", "2", "--device", "cpu"],
                "inspect": [str(path)],
            }[verb],
        ]

    return arguments


def snapshot(root: Path) -> dict[Path, bytes | None]:
    """Every file below `root` with its bytes. The token cache is apart: it is whole or not there."""
    found = {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    cache = root / "cache"
    drafts = {path for path in found if path.name.endswith(".tmp")}
    return {p: content for p, content in found.items() if p in drafts or (p != cache and cache not in p.parents)}


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must fail: one line on stderr (returned), exit code, no file changed."""

    def run(arguments: list[str], code: int = 2) -> str:
        before = snapshot(tmp_path)
        capfd.readouterr()
        found = main([*arguments, "--json"])
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("moeforge: error: ") and err.count("\n") == 1, err
        assert "(unexpected; " not in err, err
        assert found == code, err
        assert snapshot(tmp_path) == before
        return err.removeprefix("moeforge: error: ").strip()

    return run
