"""A small model that learns a small language, with experts in float32 and in FP8."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeforge.bench.fp8_training import main
from moeforge.checkpoint import save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.model import Transformer

WORDS = 60


@pytest.fixture
def config(tmp_path: Path) -> Path:
    model = Transformer(
        ModelConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
            max_positions=64, eos_token_ids=(1,), moe=MoEConfig(4, 2, 48, gate_norm=1.0),
        )
    )  # fmt: skip
    torch.manual_seed(0)
    model.reset_parameters(0.1)
    save_model(model, tmp_path / "model")
    words = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "model")
    generator, word, text = random.Random(0), 0, list[str]()
    for _ in range(3000):  # each word is followed by one of two others
        text.append(f"w{word}")
        word = (word * 2 + generator.randrange(2)) % WORDS
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(text[i : i + 30]) for i in range(0, 3000, 30)))
    (tmp_path / "run.toml").write_text(
        f"""
        [run]
        dir = "{tmp_path}/run"
        tensorboard = false
        similarity_every = 0
        [model]
        path = "{tmp_path}/model"
        precision = "fp32"
        [[data.train]]
        path = "{tmp_path}/text.txt"
        [data]
        holdout_fraction = 0.0
        sequence_length = 16
        cache_dir = "{tmp_path}/cache"
        [train]
        steps = 40
        [optimizer]
        lr = 1e-2
        [schedule]
        warmup_steps = 2
        [checkpoint]
        every = 0
        """
    )
    return tmp_path / "run.toml"


def test_the_loss_curves_lie_within_a_few_percent(config: Path, tmp_path: Path) -> None:
    main([str(config), "--out", str(tmp_path / "result.json"), "--set", "train.micro_batch_sequences=8"])
    found = json.loads((tmp_path / "result.json").read_text())
    same, fp8 = found["same"]["loss"], found["fp8"]["loss"]
    assert len(same) == len(fp8) == 40 and found["config"]["train"]["micro_batch_sequences"] == 8
    assert same[-1] < 0.7 * same[0]  # it learns
    assert same != fp8  # they are two
    assert fp8[0] == pytest.approx(same[0], rel=0.01)
    assert found["furthest_step_ratio"] == pytest.approx(1, abs=0.1)
    assert found["loss_ratio"] == pytest.approx(1, abs=0.03)
    assert found["eval_loss_ratio"] is None
