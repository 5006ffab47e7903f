"""Small dense checkpoints, written as any model directory is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import Checkpoint, ShardWriter, canonical_shapes, open_checkpoint
from moeforge.config.model import ModelConfig

MakeDense = Callable[..., Checkpoint]


@pytest.fixture
def make_dense(tmp_path: Path) -> MakeDense:
    """Writes a dense checkpoint: random weights of a size at which every part matters, norms around 1."""

    def make(
        name: str = "dense",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        norms: torch.dtype | None = None,
        **changes: Any,
    ) -> Checkpoint:
        sizes: dict[str, Any] = {
            "vocab_size": 96, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
            "head_dim": 8, "ffn_size": 48, "max_positions": 128,
        }  # fmt: skip
        config = ModelConfig(**{**sizes, **changes})
        rng = torch.Generator().manual_seed(seed)
        writer = ShardWriter(tmp_path / name, config)
        for weight, shape in canonical_shapes(config).items():
            stored = norms or dtype if "norm" in weight else dtype
            writer.add(weight, (torch.randn(shape, generator=rng) * 0.15 + ("norm" in weight)).to(stored))
        return open_checkpoint(writer.finish())

    return make


@pytest.fixture
def make_tokenizer() -> Callable[[Checkpoint, list[str]], Checkpoint]:
    """Gives a checkpoint a tokenizer of whole words, and opens it again."""

    def make(checkpoint: Checkpoint, words: list[str]) -> Checkpoint:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        model = models.WordLevel({"<unk>": 0, **{word: i + 1 for i, word in enumerate(words)}}, unk_token="<unk>")
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(checkpoint.path)
        return open_checkpoint(checkpoint.path)

    return make
