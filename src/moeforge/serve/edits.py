"""Changes to logits before a token is chosen: grammar, min_tokens, logit_bias, penalties.

Legend: R rows, g those with a grammar, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moeforge.serve.draw import host_tensor
from moeforge.serve.penalties import Penalties
from moeforge.serve.request import Request


def edited(request: Request) -> bool:
    """Whether a request's logits change at all."""
    params = request.params
    return request.grammar is not None or bool(params.logit_bias) or params.min_tokens > 0 or params.penalizes


class Edits:
    """Edits the logits of the same requests again and again. `penalties` follows these."""

    def __init__(
        self, requests: Sequence[Request], penalties: Penalties, vocab_size: int, device: torch.device
    ) -> None:
        self._requests, self._vocab_size, self._device = requests, vocab_size, device
        grammar = [row for row, request in enumerate(requests) if request.grammar is not None]
        self._grammars = [requests[row].grammar for row in grammar]
        self._grammar_rows = self._tensor(grammar)
        self._bits = torch.arange(32, dtype=torch.int32, device=device)
        # Rows that may not end yet, and where their ends are: row, token.
        self._barred: list[int] = []
        self._barred_at = self._tensor([])
        bias = [(row, *pair) for row, r in enumerate(requests) for pair in (r.params.logit_bias or {}).items()]
        self._bias_at = self._tensor([[row for row, _, _ in bias], [token for _, token, _ in bias]])
        self._bias = host_tensor([value for _, _, value in bias], torch.float32, device)
        self._penalties = penalties if any(request.params.penalizes for request in requests) else None

    def apply(self, logits_RV: Tensor) -> None:
        """Changes the logits (float32, contiguous) in place."""
        if self._grammars:
            masked_gV = logits_RV[self._grammar_rows].where(self._allowed(), -math.inf)
            logits_RV[self._grammar_rows] = masked_gV
        self._bar_ends(logits_RV)
        if len(self._bias):
            logits_RV[self._bias_at[0], self._bias_at[1]] += self._bias
        if self._penalties is not None:
            self._penalties.apply(logits_RV)

    def _allowed(self) -> Tensor:
        masks = [grammar.mask() for grammar in self._grammars if grammar is not None]
        words = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.int32).view(len(masks), -1)
        if self._device.type != "cpu":
            words = words.pin_memory().to(self._device, non_blocking=True)
        return ((words[:, :, None] >> self._bits) & 1).bool().flatten(1)[:, : self._vocab_size]

    def _bar_ends(self, logits_RV: Tensor) -> None:
        barred = [row for row, r in enumerate(self._requests) if r.num_output_tokens < r.params.min_tokens]
        if not barred:
            return
        if barred != self._barred:
            ends = [(row, end) for row in barred for end in self._requests[row].ends if end < self._vocab_size]
            self._barred = barred
            self._barred_at = self._tensor([[row for row, _ in ends], [end for _, end in ends]])
        rows, ends = self._barred_at
        before = logits_RV[rows, ends]
        logits_RV[rows, ends] = torch.full_like(before, -math.inf)
        # Where the grammar lets only the end follow, it does.
        others_R = logits_RV.amax(-1) > -math.inf
        logits_RV[rows, ends] = before.where(~others_R[rows], -math.inf)

    def _tensor(self, values: object) -> Tensor:
        return host_tensor(values, torch.int64, self._device)
