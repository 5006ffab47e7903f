"""GGUF files of the Llama family (llama, also with experts; qwen2, qwen3, qwen3moe), read tensor by tensor.

Names are canonical already. llama.cpp stores q and k of the `llama` architecture with each head's rows
interleaved for its rotary form; they are put back into the rotate-half order here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from moeforge.checkpoint.names import EMBED, HEAD
from moeforge.checkpoint.source import Shape, first_line, incomplete
from moeforge.config.hf import model_config_from_hf
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
_GLOBAL = {"token_embd": EMBED.removesuffix(".weight"), "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "block_sparse_moe.gate",
}  # fmt: skip
_EXPERTS = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
# Weights that another GGUF tensor replaces, or that carry no weight of the model.
_NOT_WEIGHTS = ("rope_freqs.weight",)


class GGUFSource:
    """One GGUF file: `config` from its metadata, tensors in float32. Raises UserError if unreadable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
            raise incomplete(path, f"cannot be read as GGUF ({first_line(error)})") from None
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = str(self._metadata("general.architecture"))
        if self._architecture not in _FAMILIES:
            raise UserError(
                f"{path}: general.architecture = {self._architecture!r} is not supported; supported GGUF "
                f"architectures are {', '.join(_FAMILIES)}"
            )
        self.config: ModelConfig = model_config_from_hf(self._hf_config())
        try:
            self._tensors = self._canonical_tensors()
        except IndexError:
            raise incomplete(path, "holds a tensor whose name or shape is not of a Llama-family GGUF") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Every canonical name."""
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        """Its shape, rows first."""
        stored, expert = self._tensors[name]
        shape = tuple(int(size) for size in reversed(stored.shape))
        return shape if expert is None else shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        """float32, into which everything is dequantised."""
        return torch.float32

    def tensor(self, name: str) -> Tensor:
        """The dequantised weight. Raises UserError for a quantisation that the gguf package cannot undo."""
        stored, expert = self._tensors[name]
        data = stored.data if expert is None else stored.data[expert]
        try:
            values = np.array(dequantize(data, stored.tensor_type), dtype=np.float32)
        except (NotImplementedError, KeyError):
            kind = GGMLQuantizationType(stored.tensor_type).name
            raise UserError(
                f"{self.path}: {stored.name} is quantised as {kind}, which cannot be read; convert the file "
                "to one of F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K, Q4_0, Q4_1"
            ) from None
        tensor = torch.from_numpy(values)
        if self._architecture == "llama":
            heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
            if count := heads.get(name.split(".")[-2]):
                tensor = tensor.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    def _metadata(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError:
            raise incomplete(self.path, f"{key} is not UTF-8") from None

    def _hf_config(self) -> dict[str, Any]:
        """The same facts under Hugging Face's keys."""

        def get(key: str, default: Any = None) -> Any:
            value = self._metadata(f"{self._architecture}.{key}", default)
            return _decimal(value) if isinstance(value, float) else value

        embedding = self._stored.get("token_embd.weight")
        if embedding is None:
            raise incomplete(self.path, "has no token_embd.weight")
        keys = ("attention.head_count", "embedding_length", "feed_forward_length")
        heads, hidden, width = map(get, keys)
        for key, value in zip(keys, (heads, hidden, width), strict=True):
            if not (isinstance(value, int) and value > 0):
                raise UserError(f"{self.path}: {key} = {value}: must be one positive number for all layers")
        head_dim = get("attention.key_length", hidden // heads)
        experts = get("expert_count", 0)
        family = _FAMILIES[self._architecture]
        ends = [self._metadata(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        return {
            "model_type": "mixtral" if experts and family == "llama" else family,
            "vocab_size": int(embedding.shape[1]),
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-5),
            "max_position_embeddings": get("context_length"),
            "partial_rotary_factor": get("rope.dimension_count", head_dim) / max(head_dim, 1),
            "rope_theta": get("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(get, head_dim),
            "attention_bias": family == "llama" and "blk.0.attn_q.bias" in self._stored,
            "tie_word_embeddings": "output.weight" not in self._stored,
            "num_local_experts": experts,
            "num_experts_per_tok": get("expert_used_count", 2),
            "moe_intermediate_size": get("expert_feed_forward_length", width),
            "norm_topk_prob": True,  # what llama.cpp computes, whatever the original said (formats.md 4)
            "bos_token_id": self._metadata("tokenizer.ggml.bos_token_id"),
            "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        }

    def _rope_scaling(self, get: Any, head_dim: int) -> dict[str, Any] | None:
        kind, original = get("rope.scaling.type", "none"), get("rope.scaling.original_context_length")
        if "rope_freqs.weight" in self._stored:
            divisors = self._stored["rope_freqs.weight"].data
            return _llama3_scaling(self.path, divisors, get("rope.freq_base", 10000.0), head_dim)
        if kind == "none":
            return None
        factor = get("rope.scaling.factor", 1.0)
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}

    def _canonical_tensors(self) -> dict[str, tuple[ReaderTensor, int | None]]:
        tensors: dict[str, tuple[ReaderTensor, int | None]] = {}
        for name, stored in self._stored.items():
            stem, _, kind = name.rpartition(".")
            *block, part = stem.split(".")
            layer = f"model.layers.{block[1]}" if block else ""
            if block and part in _EXPERTS:
                for e in range(int(stored.shape[2])):
                    expert = f"{layer}.block_sparse_moe.experts.{e}.{_EXPERTS[part]}.{kind}"
                    tensors[expert] = (stored, e)
            elif block:
                tensors[f"{layer}.{_BLOCK.get(part, part)}.{kind}"] = (stored, None)
            elif name not in _NOT_WEIGHTS:
                tensors[f"{_GLOBAL.get(part, part)}.{kind}"] = (stored, None)
        if self.config.tie_embeddings:
            tensors.pop(HEAD, None)
        return tensors


def _decimal(value: float) -> float:
    """The shortest decimal of a float32 metadata value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama3_scaling(path: Path, divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, which GGUF stores only as one divisor for each frequency.

    Its ramp limits are the same in all published models (1 and 4, 8192 positions); a file that these do not
    explain is refused.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    ramp = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    last = min(float(ramp[-1]), 0.99)
    factor = round((1 - last) / (1 / float(divisors[-1]) - last), 3)
    if not np.allclose(1.0 / ((1 - ramp) / factor + ramp), divisors, rtol=1e-3):
        raise UserError(f"{path}: rope_freqs.weight is not Llama 3.1's scaling, the only one supported there")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
