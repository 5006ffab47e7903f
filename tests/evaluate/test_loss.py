"""Held-out loss against the written formula."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.data import Batch
from moeforge.errors import UserError
from moeforge.evaluate import EvalResult, held_out_loss
from moeforge.model import DenseAttention, ForwardContext, Transformer

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=48,
    moe=MoEConfig(num_experts=4, top_k=2, expert_size=24, gate_norm=1.0),
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.reset_parameters(std=0.2)
    return model


def batch(sequences: int, positions: int, seed: int = 0) -> Batch:
    """Random rows of two documents each, the last three positions padding."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, CONFIG.vocab_size, (sequences, positions), generator=random)
    split = positions // 2
    documents = torch.zeros(sequences, positions, dtype=torch.int32)
    documents[:, split:] = 1
    documents[:, -3:] = -1
    restart = torch.cat([torch.arange(split), torch.arange(positions - split)]).expand(sequences, -1)
    targets = tokens.roll(-1, 1)
    targets[:, split - 1] = targets[:, -4:] = -100
    return Batch(tokens, targets, restart.contiguous(), documents)


def expected(model: Transformer, data: Batch) -> tuple[float, int]:
    """The two documents of each row by themselves, cross-entropy by torch."""
    split = data.tokens.shape[1] // 2
    total, count = 0.0, 0
    for row_tokens, row_targets in zip(data.tokens, data.targets, strict=True):
        for part in (slice(0, split), slice(split, -3)):
            tokens, targets = row_tokens[part], row_targets[part]
            context = ForwardContext(DenseAttention(1, len(tokens)))
            with torch.no_grad():
                logits = model.logits(model(tokens, torch.arange(len(tokens)), context), context)
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            count += int((targets >= 0).sum())
    return total, count


def test_loss_is_that_of_each_document_by_itself(model: Transformer) -> None:
    data = batch(3, 24)
    total, count = expected(model, data)
    result = held_out_loss(model, [data])
    assert result.tokens == count == 3 * (24 - 3 - 2)
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_every_token_weighs_the_same_however_batches_are_cut(model: Transformer) -> None:
    data, other = batch(4, 24), batch(2, 16, seed=1)
    whole = held_out_loss(model, [data, other])
    cut = held_out_loss(model, [data.slice(0, 1), other, data.slice(1, 4)])
    assert cut.tokens == whole.tokens
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)


def test_the_model_is_left_as_it_was(model: Transformer) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    held_out_loss(model, [batch(1, 16)])
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_device_is_asked_for_nothing_before_the_last_batch() -> None:
    """The meta device has no values: asking it for one raises."""
    model = Transformer(dataclasses.replace(CONFIG, moe=None)).to("meta")
    taken: list[int] = []

    def batches() -> Iterator[Batch]:
        for seed in range(3):
            taken.append(seed)
            yield batch(2, 16, seed)

    with pytest.raises(RuntimeError, match="meta"):  # the result itself
        held_out_loss(model, batches())
    assert taken == [0, 1, 2]


def test_nothing_to_predict_is_refused(model: Transformer) -> None:
    with pytest.raises(UserError, match="0 tokens"):
        held_out_loss(model, [])


def test_a_broken_model_has_infinite_perplexity() -> None:
    assert EvalResult.of(1e6, 1).perplexity == math.inf
