"""Changes to logits before a token is chosen: grammar, min_tokens, logit_bias, penalties.

Legend: E edited rows, g those with a grammar, V vocabulary.
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
    """Edits the logits of the same requests again and again. `penalties` follows those of them with penalties."""

    def __init__(
        self, requests: Sequence[Request], penalties: Penalties, vocab_size: int, device: torch.device
    ) -> None:
        self._requests, self._penalties = requests, penalties
        self._vocab_size, self._device = vocab_size, device
        grammar = [row for row, request in enumerate(requests) if request.grammar is not None]
        self._grammars = [requests[row].grammar for row in grammar]
        self._grammar_rows = self._tensor(grammar)
        self._minus_infinity = torch.full((), -math.inf, device=device)
        self._bits = torch.arange(32, dtype=torch.int32, device=device)
        # Rows that may not end yet, in Python and on the device, and their ends: place among those rows, token.
        self._barred: list[int] = []
        self._barred_rows = self._barred_at = self._tensor([])
        bias = [(row, *pair) for row, r in enumerate(requests) for pair in (r.params.logit_bias or {}).items()]
        self._bias_at = self._tensor([[row for row, _, _ in bias], [token for _, token, _ in bias]])
        self._bias = host_tensor([value for _, _, value in bias], torch.float32, device)
        self._penalized_rows = self._tensor([row for row, r in enumerate(requests) if r.params.penalizes])

    def apply(self, logits_EV: Tensor) -> None:
        """Changes the logits (float32) in place."""
        if self._grammars:
            masked_gV = logits_EV[self._grammar_rows].where(self._allowed(), -math.inf)
            logits_EV[self._grammar_rows] = masked_gV
        self._bar_ends(logits_EV)
        if len(self._bias):
            logits_EV[self._bias_at[0], self._bias_at[1]] += self._bias
        if len(self._penalized_rows):
            penalized_PV = logits_EV[self._penalized_rows]
            self._penalties.apply(penalized_PV)
            logits_EV[self._penalized_rows] = penalized_PV

    def _allowed(self) -> Tensor:
        masks = [grammar.mask() for grammar in self._grammars if grammar is not None]
        words = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.int32).view(len(masks), -1)
        if self._device.type != "cpu":
            words = words.pin_memory().to(self._device, non_blocking=True)
        return ((words[:, :, None] >> self._bits) & 1).bool().flatten(1)[:, : self._vocab_size]

    def _bar_ends(self, logits_EV: Tensor) -> None:
        barred = [row for row, r in enumerate(self._requests) if r.num_output_tokens < r.params.min_tokens]
        if not barred:
            return
        if barred != self._barred:
            ends = [
                (at, end) for at, row in enumerate(barred) for end in self._requests[row].ends if end < self._vocab_size
            ]
            self._barred, self._barred_rows = barred, self._tensor(barred)
            self._barred_at = self._tensor([[at for at, _ in ends], [end for _, end in ends]])
        logits_bV = logits_EV[self._barred_rows]
        without_bV = logits_bV.index_put((self._barred_at[0], self._barred_at[1]), self._minus_infinity)
        # Where the grammar lets only the end follow, it does.
        others_b1 = without_bV.amax(-1, keepdim=True) > -math.inf
        logits_EV[self._barred_rows] = torch.where(others_b1, without_bV, logits_bV)

    def _tensor(self, values: object) -> Tensor:
        return host_tensor(values, torch.int64, self._device)
