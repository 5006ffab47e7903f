"""Chooses the next token of every sequence of a batch, each by its own parameters.

Legend: R rows (sequences that need a token), L those with log-probabilities, V vocabulary, B any
rows, G groups of g tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeforge.errors import RunError
from moeforge.serve.draw import Draw, host_tensor
from moeforge.serve.edits import Edits, edited
from moeforge.serve.outputs import Sampled
from moeforge.serve.penalties import Penalties
from moeforge.serve.request import Request

_GROUP = 64


class Sampler:
    """Samples for a model of `vocab_size` tokens on a device.

    A draw depends on the request's own seed, index, position and logits, never on its batch mates.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._vocab_size, self._device = vocab_size, torch.device(device)
        self._penalties = Penalties(vocab_size, self._device)
        self._plan = _Plan([], self._penalties, vocab_size, self._device)

    @torch.inference_mode()
    def __call__(self, logits_RV: Tensor, requests: Sequence[Request]) -> list[Sampled]:
        """The next token of each request. logits_RV: of any float type, unchanged; columns beyond V are left out.

        Waits for the device once, at the end. Raises RunError if a row's greatest logit is not finite.
        """
        requests = list(requests)
        if self._plan.requests != requests:
            self._plan = _Plan(requests, self._penalties, self._vocab_size, self._device)
        return self._plan.sample(logits_RV[:, : self._vocab_size])


class _Plan:
    """What a sequence of requests needs, which stays the same as long as they come again."""

    def __init__(self, requests: list[Request], penalties: Penalties, vocab_size: int, device: torch.device) -> None:
        self.requests = requests
        self._device = device
        penalties.follow(requests)
        self._edits = Edits(requests, penalties, vocab_size, device) if any(map(edited, requests)) else None
        drawn = [row for row, request in enumerate(requests) if not request.params.greedy]
        self._drawn, self._drawn_rows = [requests[row] for row in drawn], self._rows(drawn)
        self._draw = Draw(self._drawn, vocab_size, device) if drawn else None
        logged = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        self._logged, self._logged_rows = logged, self._rows(logged)
        most = max((requests[row].params.logprobs or 0 for row in logged), default=0)
        self._width = min(most, vocab_size)

    def sample(self, logits_RV: Tensor) -> list[Sampled]:
        greatest_R, tokens_R = greatest(logits_RV)
        edited_RV = logits_RV
        if self._edits is not None:
            edited_RV = logits_RV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            self._edits.apply(edited_RV)
            tokens_R = greatest(edited_RV)[1]
        if self._draw is not None:
            positions = [request.num_tokens for request in self._drawn]
            tokens_R[self._drawn_rows] = self._draw(edited_RV[self._drawn_rows], positions)
        tokens_R = tokens_R.where(greatest_R.isfinite(), -1)
        if not self._logged:
            return [Sampled(token) for token in _finite(tokens_R.tolist())]
        return self._with_logprobs(logits_RV, tokens_R)

    def _with_logprobs(self, logits_RV: Tensor, tokens_R: Tensor) -> list[Sampled]:
        logprobs_LV = logits_RV[self._logged_rows].float().log_softmax(-1)
        chosen_L = logprobs_LV.gather(1, tokens_R[self._logged_rows].clamp(min=0)[:, None])
        top = logprobs_LV.topk(self._width)
        # All in one copy; float64 holds tokens and float32 exactly.
        parts = [tokens_R, chosen_L.flatten(), top.values.flatten(), top.indices.flatten()]
        numbers = torch.cat([part.double() for part in parts]).tolist()
        rows, logged, width = len(self.requests), len(self._logged), self._width
        sampled = [Sampled(token) for token in _finite([int(token) for token in numbers[:rows]])]
        values, tokens = numbers[rows + logged :][: logged * width], numbers[rows + logged + logged * width :]
        for at, row in enumerate(self._logged):
            token, logprob = sampled[row].token, numbers[rows + at]
            asked = slice(at * width, at * width + min(width, self.requests[row].params.logprobs or 0))
            likeliest = dict(zip(map(int, tokens[asked]), values[asked], strict=True))
            sampled[row] = Sampled(token, logprob, likeliest | {token: logprob})
        return sampled

    def _rows(self, rows: list[int]) -> Tensor | slice:
        return slice(None) if len(rows) == len(self.requests) else host_tensor(rows, torch.int64, self._device)


def greatest(x_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest value of each row and its token, the lowest of equal ones; NaN where any value is."""
    groups = x_BV.shape[1] // _GROUP
    if x_BV.is_cuda or groups < 2:
        return x_BV.max(-1)
    # On a CPU, torch finds a maximum 50 times as fast as its place.
    x_BGg = x_BV[:, : groups * _GROUP].unflatten(1, (groups, _GROUP))
    values, group = x_BGg.amax(-1).max(-1)
    inside = x_BGg[torch.arange(len(x_BGg)), group].argmax(-1)
    tokens = group * _GROUP + inside
    if groups * _GROUP < x_BV.shape[1]:
        rest, place = x_BV[:, groups * _GROUP :].max(-1)
        tokens = torch.where(rest > values, groups * _GROUP + place, tokens)
        values = torch.maximum(values, rest)
    return values, tokens


def _finite(tokens: list[int]) -> list[int]:
    if tokens and min(tokens) < 0:
        raise RunError("the model's logits are not finite (NaN or infinity); its weights are damaged")
    return tokens
