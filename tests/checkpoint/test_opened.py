"""A checkpoint holds exactly its model's weights, and carries its tokenizer along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeforge.checkpoint import open_checkpoint, save_model
from moeforge.checkpoint.load import load_model
from moeforge.errors import UserError


def _change(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    """Change the weights and return what opening them then says."""
    file = directory / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_weights_are_counted_and_named(saved: Path) -> None:
    message = _change(saved, lambda state: [state.pop(name) for name in list(state) if "layers.2." in name])
    assert "9 tensors missing: model.layers.2." in message
    assert "and 6 more" in message


def test_weights_that_do_not_belong_are_named(saved: Path) -> None:
    message = _change(saved, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    assert "1 tensors not part of this model: model.layers.0.self_attn.q_proj.bias" in message


def test_a_shape_that_config_json_does_not_ask_for(saved: Path) -> None:
    message = _change(saved, lambda state: state.update({"model.norm.weight": torch.ones(31)}))
    assert "model.norm.weight has shape (31,); config.json asks for (32,)" in message


def _write_tokenizer(directory: Path, tokens: int) -> None:
    vocabulary = {f"w{i}": i for i in range(tokens - 1)} | {"<unk>": tokens - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(directory)


def test_the_tokenizer_travels_with_the_model(saved: Path, tmp_path: Path) -> None:
    _write_tokenizer(saved, 60)
    source = open_checkpoint(saved)
    save_model(load_model(source), tmp_path / "out", tokenizer_from=source)
    copy = open_checkpoint(tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in copy.tokenizer_files}
    assert copy.tokenizer()("w3 w59 w5").input_ids == source.tokenizer()("w3 w59 w5").input_ids == [3, 59, 5]
    assert copy.tokenizer().chat_template == source.tokenizer().chat_template


def test_a_tokenizer_larger_than_the_embedding(saved: Path) -> None:
    _write_tokenizer(saved, 68)
    checkpoint = open_checkpoint(saved)
    with pytest.raises(UserError, match="ids up to 67 but the embedding has only 67 rows"):
        checkpoint.tokenizer()


def test_the_highest_id_must_fit_where_ids_have_gaps(saved: Path) -> None:
    _write_tokenizer(saved, 60)
    file = saved / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["late"] = 67
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="ids up to 67 but the embedding has only 67 rows"):
        open_checkpoint(saved).tokenizer()
