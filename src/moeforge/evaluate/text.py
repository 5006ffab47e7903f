"""Perplexity of one text, read through a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moeforge.config.model import ModelConfig
from moeforge.data import Batch
from moeforge.errors import UserError

_BATCH_TOKENS = 8192
_IGNORE = -100


def sliding_windows(tokens: list[int], window: int, stride: int) -> Iterator[Batch]:
    """Windows of `window` tokens, `stride` apart, in batches; each token but the first is a target once.

    So a target sees at least `window - stride` tokens before it, where the text has them. The last window may
    be padded (document -1). Raises UserError unless 1 <= stride <= window.
    """
    if not 1 <= stride <= window:
        raise UserError(f"stride = {stride}: must be between 1 and the window ({window})")
    sequence = torch.tensor(tokens)
    windows: list[Batch] = []
    done = 1  # tokens before this one are predicted already
    for begin in range(0, len(tokens) - 1, stride):
        end = min(begin + window, len(tokens) - 1)
        if end < done:
            break
        windows.append(_window(sequence, begin, end, done, window))
        done = end + 1
        if len(windows) * window >= _BATCH_TOKENS:
            yield _stack(windows)
            windows = []
    if windows:
        yield _stack(windows)


def _window(sequence: torch.Tensor, begin: int, end: int, done: int, window: int) -> Batch:
    """Inputs begin..end-1, targets done..end, one row."""
    length = end - begin
    tokens = torch.zeros(window, dtype=torch.int64)
    tokens[:length] = sequence[begin:end]
    targets = torch.full((window,), _IGNORE)
    targets[done - 1 - begin : length] = sequence[done : end + 1]
    documents = torch.full((window,), -1, dtype=torch.int32)
    documents[:length] = 0
    return Batch(tokens, targets, torch.arange(window), documents)


def _stack(rows: list[Batch]) -> Batch:
    return Batch(*(torch.stack([getattr(row, name) for row in rows]) for name in Batch.__dataclass_fields__))


def text_windows(
    config: ModelConfig,
    tokens: list[int],
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """For `held_out_loss`: the first `max_tokens` targets (None: all) in windows `stride` apart.

    `stride` defaults to half a window. Raises UserError for a window beyond the model's positions, and for tokens
    outside its vocabulary.
    """
    positions, vocab_size = config.max_positions, config.vocab_size
    if not 1 <= window <= positions:
        raise UserError(f"sequence_length = {window}: must be between 1 and the model's positions ({positions})")
    if max_tokens is not None:
        if max_tokens < 1:
            raise UserError(f"max_tokens = {max_tokens}: must be at least 1")
        tokens = tokens[: max_tokens + 1]  # the first one predicts only
    if tokens and max(tokens) >= vocab_size:
        raise UserError(f"token {max(tokens)}: the model's vocab_size is {vocab_size}; use its own tokenizer")
    stride = max(1, window // 2) if stride is None else stride
    return sliding_windows(tokens, window, stride)


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """As transformers' `tokenizer` encodes a text, with its own special tokens."""
    tokens: list[int] = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return tokens
