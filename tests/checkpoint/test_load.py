"""A model goes to a directory and back, and other readers take the same from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moeforge.checkpoint import Checkpoint, load_model, load_part, open_checkpoint, save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import RunError, UserError
from moeforge.model import Transformer

DENSE = ModelConfig(
    vocab_size=67, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=48,
    max_positions=128, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip
EXPERTS = MoEConfig(num_experts=5, top_k=2, expert_size=24)


def _model(**changes: Any) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(dataclasses.replace(DENSE, **changes))
    model.reset_parameters(std=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


FORMS = {
    "LlamaForCausalLM": {"tie_embeddings": True},
    "MistralForCausalLM": {"sliding_window": 9},
    "Qwen2ForCausalLM": {"qkv_bias": True, "sliding_window": 9, "sliding_window_first_layer": 2},
    "Qwen3ForCausalLM": {"qk_norm": "head", "sliding_window": 9},
    "MixtralForCausalLM": {"moe": EXPERTS},
    "Qwen3MoeForCausalLM": {
        "moe": dataclasses.replace(EXPERTS, layer_frequency=2, renormalize=False),
        "qk_norm": "head",
    },
}


@pytest.mark.parametrize("architecture", FORMS)
def test_transformers_computes_the_same_from_what_we_write(
    architecture: str, tmp_path: Path, our_logits: Any, their_logits: Any
) -> None:
    model = _model(**FORMS[architecture])
    save_model(model, tmp_path / "out")
    loader = getattr(transformers, architecture)
    theirs, report = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert theirs.config.architectures == [architecture]
    assert not any(report.values())
    torch.testing.assert_close(their_logits(theirs.eval()), our_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        *FORMS.values(),
        {"moe": dataclasses.replace(EXPERTS, gate_norm=1.5)},
        {"moe": dataclasses.replace(EXPERTS, gate_norm=2.0, gate_norm_learned=True, router_bias=True)},
        {"moe": dataclasses.replace(EXPERTS, layer_frequency=2), "qkv_bias": True},
        {"moe": EXPERTS, "qk_norm": "full"},
        {"qkv_bias": True, "output_bias": True},
    ],
)
def test_what_we_write_we_read_back_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    model = _model(**changes)
    save_model(model, tmp_path / "out")
    back = load_model(tmp_path / "out")
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name]), name
    assert dataclasses.replace(back.config, family="llama", ffn_size=48) == model.config


def test_a_loaded_model_does_not_write_into_its_file(saved: Path) -> None:
    model = load_model(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert open_checkpoint(saved).tensor("model.embed_tokens.weight").abs().sum() > 0
    assert load_model(saved).embed.weight.abs().sum() > 0


def test_dtype_is_that_asked_for(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    save_model(model, tmp_path / "wide", dtype=torch.float32)
    assert open_checkpoint(tmp_path / "wide").dtype("model.norm.weight") == torch.float32
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_nan_and_infinite_weights_are_named(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    for kind, value in (("NaN", float("nan")), ("infinite", float("inf"))):
        theirs = tiny("Llama")
        theirs.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        theirs.save_pretrained(tmp_path / kind)
        with pytest.raises(UserError, match=rf"layers\.1\.mlp\.up_proj\.weight: .*{kind} weights"):
            load_model(tmp_path / kind)


def test_an_output_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not empty"):
        save_model(_model(), tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(RunError, match=r"needs .* GB of disk, 0\.0 GB are available; nothing was written"):
        save_model(_model(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class _Part:
    view: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def test_a_part_is_cut_and_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(moe=dataclasses.replace(EXPERTS, layer_frequency=2))
    save_model(model, tmp_path / "out")
    whole, asked = model.state_dict(), list[str]()
    stored = Checkpoint.tensor

    def tensor(self: Checkpoint, name: str) -> torch.Tensor:
        asked.append(name)
        return stored(self, name)

    opened = open_checkpoint(tmp_path / "out")
    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    parts = {
        "layers.1.ffn.experts.w13": _Part((5, 2, 24, 32), (3, 0, 8, 0), (2, 2, 7, 32), (2, 14, 32)),
        "layers.3.ffn.experts.w2": _Part((5, 32, 24), (2, 0, 5), (1, 32, 19), (1, 32, 19)),
        "layers.3.ffn.experts.w13": _Part((5, 2, 24, 32), (5, 0, 0, 0), (0, 2, 24, 32), (0, 48, 32)),
        "layers.2.ffn.w13.weight": _Part((2, 48, 32), (0, 16, 0), (2, 32, 32), (64, 32)),
        "layers.2.attention.o.weight": _Part((32, 64), (0, 32), (32, 32), (32, 32)),
        "head.norm.weight": _Part((32,), (0,), (32,), (32,)),
    }
    found = load_part(opened, parts, torch.float64)
    experts = whole["layers.1.ffn.experts.w13"].view(5, 2, 24, 32)[3:, :, 8:15].reshape(2, 14, 32)
    expected = {
        "layers.1.ffn.experts.w13": experts,
        "layers.3.ffn.experts.w2": whole["layers.3.ffn.experts.w2"][2:3, :, 5:],
        "layers.3.ffn.experts.w13": torch.empty(0, 48, 32),
        "layers.2.ffn.w13.weight": whole["layers.2.ffn.w13.weight"].view(2, 48, 32)[:, 16:].reshape(64, 32),
        "layers.2.attention.o.weight": whole["layers.2.attention.o.weight"][:, 32:],
        "head.norm.weight": whole["head.norm.weight"],
    }
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].is_contiguous() and torch.equal(found[name], weight.double()), name
    block = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    assert sorted(asked) == sorted([
        *(block.format(1, e, w) for e in (3, 4) for w in ("w1", "w3")), block.format(3, 2, "w2"),
        "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.self_attn.o_proj.weight", "model.norm.weight",
    ])  # fmt: skip
    found["head.norm.weight"].zero_()
    assert open_checkpoint(tmp_path / "out").tensor("model.norm.weight").abs().sum() > 0


def test_nan_in_a_part_is_named(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        model.get_parameter("head.norm.weight")[3] = float("nan")
    save_model(model, tmp_path / "out")
    with pytest.raises(UserError, match=r"model\.norm\.weight: .*NaN weights"):
        load_part(
            open_checkpoint(tmp_path / "out"), {"head.norm.weight": _Part((32,), (0,), (9,), (9,))}, torch.float32
        )
