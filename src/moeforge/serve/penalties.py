"""Penalties for tokens that came before.

Legend: P requests with penalties, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.serve.draw import host_tensor
from moeforge.serve.request import Request


class Penalties:
    """Counts the tokens of the requests that it follows, each token once as long as its request stays."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._requests: list[Request] = []
        self._counted: list[int] = []  # tokens of each that are counted
        self._output_PV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._seen_PV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def apply(self, logits_PV: Tensor) -> None:
        """Changes the logits (float32) of the followed requests in place, each row by its request's parameters."""
        self._count()
        scaled = torch.where(logits_PV > 0, logits_PV / self._repetition, logits_PV * self._repetition)
        torch.where(self._seen_PV, scaled, logits_PV, out=logits_PV)
        logits_PV -= self._frequency * self._output_PV
        logits_PV -= self._presence * (self._output_PV > 0)

    def follow(self, requests: list[Request]) -> None:
        """Follow these from now on. Those that stay keep their counts."""
        rows = {request: row for row, request in enumerate(self._requests)}
        stay = [(row, rows[request]) for row, request in enumerate(requests) if request in rows]
        output, seen = self._output_PV, self._seen_PV
        self._output_PV = output.new_zeros(len(requests), self._vocab_size)
        self._seen_PV = seen.new_zeros(len(requests), self._vocab_size)
        counted = [0] * len(requests)
        if stay:
            new, old = host_tensor(list(zip(*stay, strict=True)), torch.int64, self._device)
            self._output_PV[new], self._seen_PV[new] = output[old], seen[old]
            for row, before in stay:
                counted[row] = self._counted[before]
        self._requests, self._counted = requests, counted
        if not requests:
            return
        names = "repetition_penalty", "frequency_penalty", "presence_penalty"
        columns = [[getattr(request.params, name) for request in requests] for name in names]
        self._repetition, self._frequency, self._presence = host_tensor(columns, torch.float32, self._device)[..., None]

    def _count(self) -> None:
        rows: list[int] = []
        tokens: list[int] = []
        generated: list[int] = []
        for row, (request, begin) in enumerate(zip(self._requests, self._counted, strict=True)):
            new = request.all_token_ids[begin:]
            rows += [row] * len(new)
            tokens += new
            prompt = max(0, len(request.prompt_token_ids) - begin)
            generated += [0] * prompt + [1] * (len(new) - prompt)
            self._counted[row] += len(new)
        if tokens:
            at = host_tensor([rows, tokens], torch.int64, self._device)
            added = host_tensor(generated, torch.int32, self._device)
            self._output_PV.index_put_((at[0], at[1]), added, accumulate=True)
            self._seen_PV.index_put_((at[0], at[1]), torch.ones_like(added, dtype=torch.bool))
