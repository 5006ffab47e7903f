"""What a user may name as a model, and what is said where nothing usable is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import UserError


def _refusal(model: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_there(tmp_path: Path) -> None:
    message = _refusal(tmp_path / "nowhere" / "at" / "all")
    assert "no such directory or file" in message
    assert "smollm2-135m" in message, "presets are listed"


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    assert "no config.json" in _refusal(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    assert "neither a directory nor a .gguf file" in _refusal(tmp_path / "model.zip")


def test_no_weights_yet(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    message = _refusal(saved)
    assert "no weights there" in message
    assert "half-downloaded" in message


@pytest.mark.parametrize("text", ["", '{"model_type": "lla', "[1]"])
def test_a_config_that_is_none(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    assert "config.json" in _refusal(saved)


def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    message = _refusal("someone/some-model-that-is-nowhere")
    assert "someone/some-model-that-is-nowhere" in message
    assert "cannot be reached" in message


def test_a_preset_is_a_hub_id() -> None:
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in _refusal("smollm2-135m")


def test_end_tokens_of_the_generation_config_count(saved: Path) -> None:
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert open_checkpoint(saved).config.eos_token_ids == (2, 9)


def test_a_path_may_be_a_string(saved: Path) -> None:
    assert open_checkpoint(str(saved)).path == saved


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_one_format_is_downloaded_and_the_cache_serves_offline(
    saved: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def download(hub_id: str, **wanted: object) -> str:
        asked.append(wanted)
        return str(saved)

    sibling = type("Sibling", (), {"rfilename": weights})
    answers = iter([type("Info", (), {"siblings": [sibling]})(), None])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: next(answers))
    assert open_checkpoint("some/model").config.vocab_size == 67
    patterns = asked[0]["allow_patterns"]
    assert isinstance(patterns, list)
    assert ("*.safetensors" in patterns, "pytorch_model*.bin" in patterns) == (
        weights == "model.safetensors",
        weights != "model.safetensors",
    )
    open_checkpoint("some/model")  # the hub's answer is None now, as good as no answer
    assert asked[-1] == {"local_files_only": True}
