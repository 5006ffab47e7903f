"""A checkpoint goes in, its FP8 form comes out; other readers take the same from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers

from moeforge.checkpoint import Checkpoint, dequantized, load_model, open_checkpoint, save_model
from moeforge.checkpoint.writer import ShardWriter, partial_directory
from moeforge.config.quantization import QuantizationConfig, Scales
from moeforge.data import Batch
from moeforge.errors import RunError, UserError
from moeforge.evaluate import sliding_windows
from moeforge.quantize import QuantizeResult, calibrate, observe, quantize

from .conftest import MOE, TOKENS, MakeCheckpoint, distance, logits, random_model

SCALES = get_args(Scales)
BLOCK_STATIC = ("block128", "static")  # there is no such configuration
FORMS: dict[str, dict[str, Any]] = {
    "llama, tied": {"tie_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "mixtral": {"moe": MOE},
    "qwen3_moe": {"moe": dataclasses.replace(MOE, layer_frequency=2), "qk_norm": "head"},
    "ours": {"moe": dataclasses.replace(MOE, gate_norm=1.0, gate_norm_learned=True, router_bias=True)},
    "heads of 24": {"head_dim": 24},
}


def quantized(source: Checkpoint, scales: Scales, **changes: Any) -> tuple[QuantizeResult, Checkpoint]:
    made = quantize(source, source.path.with_name("fp8"), QuantizationConfig(scales, **changes))
    return made, open_checkpoint(made.path)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("form", FORMS)
def test_the_model_computes_with_what_is_on_disk(form: str, scales: Scales, make: MakeCheckpoint) -> None:
    source = make(**FORMS[form])
    made, found = quantized(source, scales)
    assert found.config.quantization == QuantizationConfig(scales) and made.config == dataclasses.replace(
        found.config, family=made.config.family
    )
    plain, fp8 = load_model(dequantized(found)), load_model(found)
    # What lies in memory is what lies on disk, and close to what it was made of.
    torch.testing.assert_close(logits(fp8), logits(plain), rtol=0, atol=1e-5)
    assert 1e-3 < distance(logits(plain), logits(source)) < 0.15
    for name, weight in load_model(source).state_dict().items():
        if plain.state_dict()[name].equal(weight):
            assert fp8.state_dict()[name].equal(weight), name
            assert "norm" in name or "router" in name or name.endswith("bias") or name[:4] in ("embe", "head"), name
    kinds = {parameter.dtype for name, parameter in fp8.named_parameters() if name.endswith(("qkv.weight", "w2"))}
    assert kinds == {torch.float8_e4m3fn}
    assert made.bytes_after < 0.5 * made.bytes_before
    assert made.bytes_after == sum(found.tensor(name).nbytes for name in found.names)
    assert len(made.errors) == sum(found.dtype(name) == torch.float8_e4m3fn for name in found.names)
    worst = list(made.worst(3).values())
    assert worst == sorted(made.errors.values(), reverse=True)[:3]


@pytest.mark.parametrize("scales", SCALES)
def test_activations_are_quantised_where_the_configuration_says_so(scales: Scales, make: MakeCheckpoint) -> None:
    source = make(moe=MOE)
    exact = logits(quantized(source, scales)[1])
    dynamic = quantize(source, source.path.with_name("dynamic"), QuantizationConfig(scales, "dynamic"))
    found = open_checkpoint(dynamic.path)
    assert found.config.quantization == QuantizationConfig(scales, "dynamic")
    assert 1e-3 < distance(logits(found), exact) < 0.2


def test_kept_matrices_stay_as_they_are(make: MakeCheckpoint) -> None:
    source = make(moe=dataclasses.replace(MOE, layer_frequency=2), dtype=torch.bfloat16)
    kept = ("layers.0.attention.qkv", "layers.0.ffn.w2", "layers.1.ffn.experts")
    _, found = quantized(source, "block128", kept=kept)
    assert found.config.quantization is not None and found.config.quantization.kept == kept
    before, after = load_model(source), load_model(found)
    for name, weight in before.state_dict().items():
        same = after.state_dict()[name].dtype == torch.bfloat16
        fp8 = name.endswith(("qkv.weight", "o.weight", "w13.weight", "w2.weight", "w13", "w2"))
        assert same == (not fp8 or name.startswith(kept)), name
        assert not same or weight.equal(after.state_dict()[name])
    written = json.loads((found.path / "config.json").read_text())["quantization_config"]
    assert "lm_head" in written["modules_to_not_convert"]
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in written["modules_to_not_convert"] or (
        "model.layers.1.mlp.experts.3.down_proj" in written["modules_to_not_convert"]
    )
    logits(found)


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MixtralForCausalLM": {"moe": dataclasses.replace(MOE, expert_size=256)},
    "Qwen3MoeForCausalLM": {"moe": dataclasses.replace(MOE, expert_size=128), "qk_norm": "head"},
}


@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_transformers_reads_the_blocks(architecture: str, activations: Any, make: MakeCheckpoint) -> None:
    pytest.importorskip("accelerate")  # without which transformers reads no FP8
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 384}
    source = make(dtype=torch.bfloat16, **sizes, **TRANSFORMERS[architecture])
    _, found = quantized(source, "block128", activations=activations)
    theirs, report = getattr(transformers, architecture).from_pretrained(found.path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        expected = theirs.float().eval()(TOKENS[None], use_cache=False).logits[0]
    ours = logits(load_model(dequantized(found), torch.float32))
    assert distance(ours, expected) < 0.02  # theirs are dequantised into bf16


@pytest.fixture
def batches() -> list[Batch]:
    tokens = torch.randint(67, (1025,), generator=torch.Generator().manual_seed(4))
    return list(sliding_windows([*TOKENS.tolist(), *tokens.tolist()], 32, 32))


@pytest.mark.parametrize(
    ("scales", "activations"),
    [(scales, kind) for scales in SCALES for kind in ("none", "dynamic", "static") if (scales, kind) != BLOCK_STATIC],
)
@pytest.mark.parametrize("form", ["llama, tied", "qwen3_moe", "ours"])
def test_gptq_is_nearer_to_the_source(
    form: str, scales: Scales, activations: Any, make: MakeCheckpoint, batches: list[Batch]
) -> None:
    source, cpu = make(**FORMS[form]), torch.device("cpu")
    inputs = calibrate(source, batches, torch.float32, cpu) if activations == "static" else None
    config = QuantizationConfig(scales, activations, kept=("layers.0.attention.o",))
    nearest = quantize(source, source.path.with_name("nearest"), config, inputs)
    observed = observe(source, batches, torch.float32, cpu)
    made = quantize(source, source.path.with_name("gptq"), config, inputs, observed=observed)
    assert made.bytes_after == nearest.bytes_after and made.errors.keys() == nearest.errors.keys()
    assert sum(made.errors.values()) > sum(nearest.errors.values())  # weights differ more, what they compute less
    found, other = open_checkpoint(made.path), open_checkpoint(nearest.path)
    assert found.config == other.config and found.names == other.names
    for name in found.names:
        fp8 = found.dtype(name) == torch.float8_e4m3fn
        assert fp8 != torch.equal(found.tensor(name).float(), other.tensor(name).float()), name
    exact = logits(source)
    weight_only = [load_model(dequantized(checkpoint)) for checkpoint in (found, other)]
    assert distance(logits(weight_only[0]), exact) < 0.9 * distance(logits(weight_only[1]), exact)
    assert distance(logits(found), exact) < 0.2


def test_a_source_that_cannot_be_quantised(make: MakeCheckpoint, tmp_path: Path) -> None:
    source = make(moe=MOE)
    _, found = quantized(source, "tensor")
    with pytest.raises(UserError, match="is FP8 already"):
        quantize(found, tmp_path / "again", QuantizationConfig("tensor"))
    with pytest.raises(UserError, match="already exists"):
        quantize(source, found.path, QuantizationConfig("tensor"))
    model = random_model()
    with torch.no_grad():
        model.get_parameter("layers.1.attention.o.weight")[3, 5] = torch.nan
    broken = open_checkpoint(save_model(model, tmp_path / "broken"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight.*NaN"):
        quantize(broken, tmp_path / "out", QuantizationConfig("channel"))
    assert not (tmp_path / "out").exists() and not partial_directory(tmp_path / "out").exists()
    model = random_model()
    with torch.no_grad():
        model.get_parameter("layers.1.ffn.norm.weight").fill_(1e38)
    overflowing = open_checkpoint(save_model(model, tmp_path / "overflowing"))
    observed = observe(overflowing, sliding_windows(TOKENS.tolist(), 8, 8), torch.float32, torch.device("cpu"))
    with pytest.raises(RunError, match=r"layers\.1\.ffn\.w13"):
        quantize(overflowing, tmp_path / "out", QuantizationConfig("channel"), observed=observed)
    assert not (tmp_path / "out").exists() and not partial_directory(tmp_path / "out").exists()
    with pytest.raises(UserError, match="not written from memory"):
        save_model(load_model(found), tmp_path / "saved")


def test_a_killed_run_is_begun_anew(make: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make(), tmp_path / "out"
    writer = ShardWriter(out, dataclasses.replace(source.config, quantization=QuantizationConfig("tensor")), job="x")
    writer.add(source.names[0], source.tensor(source.names[0]))
    quantize(source, out, QuantizationConfig("channel"))
    assert open_checkpoint(out).config.quantization == QuantizationConfig("channel")


def test_shards_have_an_index_that_places_the_scales(make: MakeCheckpoint, tmp_path: Path) -> None:
    source = make(moe=MOE)
    whole = quantize(source, tmp_path / "whole", QuantizationConfig("block128"))
    parts = quantize(source, tmp_path / "parts", QuantizationConfig("block128"), shard_bytes=50_000)
    index = json.loads((parts.path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight_scale_inv" in index
    assert torch.equal(logits(open_checkpoint(parts.path)), logits(open_checkpoint(whole.path)))
