"""A small mixture of experts on disk, with a tokenizer and a corpus, that trains in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeforge.checkpoint import save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.schema import TrainConfig
from moeforge.model import Transformer

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a model directory with a tokenizer; `moe` overrides MoEConfig's fields, None makes it dense."""

    def write(seed: int = 0, moe: dict[str, Any] | None = {}, **fields: Any) -> Path:  # noqa: B006
        routed: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert_size": 48, "gate_norm": 1.0}
        small: dict[str, Any] = {
            "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
            "ffn_size": 48, "max_positions": 64, "eos_token_ids": (1,),
        }  # fmt: skip
        config = ModelConfig(**(small | fields), moe=None if moe is None else MoEConfig(**(routed | moe)))
        model = Transformer(config)
        torch.manual_seed(seed)
        model.reset_parameters(0.1)
        directory = tmp_path_factory.mktemp("model") / "model"
        save_model(model, directory)
        vocabulary = {"<unk>": 0, "<eos>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
            directory
        )
        return directory

    return write


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of unequal length with something to learn: each word is followed by one of two others."""
    generator = random.Random(0)
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        index, words = generator.randrange(60), []
        for _ in range(generator.randrange(10, 60)):
            words.append(WORDS[index])
            index = (index * 2 + generator.randrange(2)) % 60
        (directory / f"{number:03d}.txt").write_text(" ".join(words))
    return directory


@pytest.fixture
def make_config(tmp_path: Path, corpus: Path) -> Callable[..., TrainConfig]:
    """A training configuration; keyword arguments are sections that replace or extend the small defaults."""

    def make(path: Path, name: str = "run", /, **sections: dict[str, Any]) -> TrainConfig:
        data: dict[str, dict[str, Any]] = {
            "run": {"dir": str(tmp_path / name), "tensorboard": False, "similarity_every": 3},
            "model": {"path": str(path), "precision": "fp32"},
            "data": {
                "train": [{"path": str(corpus), "format": "text"}],
                "holdout_fraction": 0.2,
                "sequence_length": 16,
                "cache_dir": str(tmp_path / "cache"),
            },
            "train": {"steps": 8, "batch_sequences": 4, "micro_batch_sequences": 2},
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup_steps": 2},
            "eval": {"every": 4, "sequences": 8},
            "checkpoint": {"every": 3, "keep": 2},
        }
        for section, values in sections.items():
            data.setdefault(section, {}).update(values)
        return TrainConfig.model_validate(data, strict=False)

    return make
