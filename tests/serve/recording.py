"""What an engine answers with the logits behind it, and when two answers are the same."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeforge.serve import LLM, SamplingParams
from moeforge.serve.engine import Engine
from moeforge.serve.request import Request

LOGITS, MARGIN = 1e-4, 1e-3


@dataclass
class Answer:
    """Tokens [N] that followed a prompt, and the logits [N, V] from which each was drawn."""

    prompt: list[int]
    tokens: list[int]
    logits_NV: Tensor


class RecordingSampler:
    """The engine's sampler, which keeps the logits of every request."""

    def __init__(self, engine: Engine) -> None:
        self.inner = engine.sampler
        self.rows: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        engine.sampler = self  # type: ignore[assignment]

    def __call__(self, logits_RV: Tensor, requests: Sequence[Request]) -> Any:
        for row, request in zip(logits_RV, requests, strict=True):
            self.rows[request.request_id, request.index].append(row.double().clone())
        return self.inner(logits_RV, requests)


def greedy(max_tokens: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def answers(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams | None = None) -> list[Answer]:
    """Answers of one batch."""
    recorder = RecordingSampler(llm.engine)
    try:
        outputs = llm.generate(list(prompts), params or greedy())
    finally:
        llm.engine.sampler = recorder.inner
    return [
        Answer(prompt, output.outputs[0].token_ids, torch.stack(recorder.rows[str(i), 0]))
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def require_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The serving law: logits within 1e-4, tokens equal up to where the two likeliest are within 1e-3 of each other."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.prompt == theirs.prompt
        assert len(ours.tokens) == len(theirs.tokens)
        for step, (x, y) in enumerate(zip(ours.logits_NV, theirs.logits_NV, strict=True)):
            torch.testing.assert_close(x, y, rtol=LOGITS, atol=LOGITS)
            if ours.tokens[step] != theirs.tokens[step]:
                best, next_best = y.topk(2).values
                assert best - next_best < MARGIN, f"token {step} of {ours.prompt}"
                break  # from here on the two continue different texts


def worker_processes() -> list[int]:
    """Ranks that this process has started and that are still there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == os.getpid() and b"moeforge.serve.worker" in command:
                found.append(int(entry.name))
    return found
