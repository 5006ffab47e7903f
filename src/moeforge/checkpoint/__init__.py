"""Checkpoints in and out: families, safetensors, torch archives and GGUF, all under canonical names."""

from moeforge.checkpoint.dequantized import dequantized
from moeforge.checkpoint.device import pick_device
from moeforge.checkpoint.load import load_model, load_part, save_model, write_model
from moeforge.checkpoint.names import canonical_shapes, fuse, fused_names, fused_weight, unfuse
from moeforge.checkpoint.open import open_checkpoint
from moeforge.checkpoint.opened import Checkpoint, check_tokenizer
from moeforge.checkpoint.source import check_finite
from moeforge.checkpoint.writer import ShardWriter, require_disk_space

__all__ = [
    "Checkpoint",
    "ShardWriter",
    "canonical_shapes",
    "check_finite",
    "check_tokenizer",
    "dequantized",
    "fuse",
    "fused_names",
    "fused_weight",
    "load_model",
    "load_part",
    "open_checkpoint",
    "pick_device",
    "require_disk_space",
    "save_model",
    "unfuse",
    "write_model",
]
