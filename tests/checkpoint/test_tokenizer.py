"""The tokenizer beside the weights, and what is said where it cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import UserError


@pytest.mark.parametrize("text", [None, "{", '{"version": 3}'])
def test_no_tokenizer(saved: Path, text: str | None) -> None:
    if text is not None:
        (saved / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no tokenizer can be loaded") as caught:
        open_checkpoint(saved).tokenizer()
    assert "\n" not in str(caught.value)


def _write_sentencepiece(directory: Path, content: bytes) -> None:
    settings = {
        "tokenizer_class": "SkyworkTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_skywork.SkyworkTokenizer", None]},
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>",
    }  # fmt: skip
    (directory / "tokenizer.model").write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_skywork_tokenizer_is_read_without_remote_code(saved: Path) -> None:
    pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for i, piece in enumerate(["\u2581a", "\u2581b", "\u2581", "a", "b"]):
        model.pieces.add(piece=piece, score=float(-i), type=1)
    _write_sentencepiece(saved, model.SerializeToString())
    assert open_checkpoint(saved).tokenizer()("a b").input_ids == [1, 3, 4]


def test_a_missing_sentencepiece_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeforge.checkpoint.tokenizer.find_spec", lambda _: None)
    _write_sentencepiece(saved, b"not a model")
    with pytest.raises(UserError, match="pip install sentencepiece"):
        open_checkpoint(saved).tokenizer()


@pytest.mark.parametrize("tokenizer_json", [True, False])
def test_a_tokenizer_of_remote_code_is_refused_without_asking(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_json: bool
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("nobody is there to answer")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.chdir(saved)
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (saved / "tokenizer_config.json").write_text(json.dumps(settings))
    (saved / "own.py").write_text("open('executed', 'w')\nclass OwnTokenizer: pass\n")
    if tokenizer_json:
        Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(saved / "tokenizer.json"))
    with pytest.raises(UserError, match="needs code that lies beside it, which is never run") as caught:
        open_checkpoint(saved).tokenizer()
    assert "\n" not in str(caught.value)
    assert not (saved / "executed").exists()
