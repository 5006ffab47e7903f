"""Penalties for tokens that came before.

Legend: R rows (requests), V vocabulary, N different tokens of requests with penalties.
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
        # Of each request with penalties: how often each of its tokens was generated, and how many are counted.
        self._times: dict[Request, dict[int, int]] = {}
        self._counted: dict[Request, int] = {}

    def apply(self, logits_RV: Tensor) -> None:
        """Changes the logits (float32, contiguous) of the followed requests in place, each row by its parameters."""
        self._count()
        logits = logits_RV.view(-1)
        x_N = logits[self._at_N]
        repetition_N, frequency_N, presence_N = self._parameters[:, self._at_N // self._vocab_size]
        x_N = torch.where(x_N > 0, x_N / repetition_N, x_N * repetition_N)
        logits[self._at_N] = x_N - frequency_N * self._times_N - presence_N * (self._times_N > 0)

    def follow(self, requests: list[Request]) -> None:
        """Follow these from now on; those without penalties only take a row. Those that stay keep their counts."""
        self._requests = requests
        penalized = [request for request in requests if request.params.penalizes]
        self._times = {request: self._times.get(request, {}) for request in penalized}
        self._counted = {request: self._counted.get(request, 0) for request in penalized}
        names = "repetition_penalty", "frequency_penalty", "presence_penalty"
        columns = [[getattr(request.params, name) for request in requests] for name in names]
        self._parameters = host_tensor(columns, torch.float32, self._device)
        # Where the logits of the tokens are, row * V + token, and how often each was generated.
        self._at_N = host_tensor([], torch.int64, self._device)
        self._times_N = host_tensor([], torch.float32, self._device)
        self._places: dict[int, int] = {}

    def _count(self) -> None:
        """Brings counts and tensors up to date; after `follow`, the tensors are made of all counts."""
        changed: dict[int, int] = {}
        anew = not self._places
        for row, request in enumerate(self._requests):
            if request not in self._times:
                continue
            times, begin = self._times[request], self._counted[request]
            new = request.all_token_ids[begin:]
            prompt = max(0, len(request.prompt_token_ids) - begin)
            for at, token in enumerate(new):
                times[token] = times.get(token, 0) + (at >= prompt)
            self._counted[request] = begin + len(new)
            changed |= {row * self._vocab_size + token: times[token] for token in (times if anew else new)}
        added = [at for at in changed if at not in self._places]
        self._places |= {at: place for place, at in enumerate(added, len(self._places))}
        self._at_N = torch.cat([self._at_N, host_tensor(added, torch.int64, self._device)])
        self._times_N = torch.cat([self._times_N, self._times_N.new_zeros(len(added))])
        places = host_tensor([self._places[at] for at in changed], torch.int64, self._device)
        self._times_N[places] = host_tensor(list(changed.values()), torch.float32, self._device)
