"""Sliding windows: each token a target once, with the context promised."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.evaluate import EvalResult, held_out_loss, sliding_windows, text_tokens, text_windows
from moeforge.model import DenseAttention, ForwardContext, Transformer


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_each_token_but_the_first_is_a_target_once_with_its_context(
    count: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    tokens = list(range(100, 100 + count))
    seen = []
    for batch in sliding_windows(tokens, window, stride):
        for row in range(len(batch.tokens)):
            for place in (batch.targets[row] >= 0).nonzero().flatten().tolist():
                target = int(batch.targets[row, place])
                assert batch.documents[row, place] == 0
                assert batch.tokens[row, place] == target - 1
                assert place + 1 >= min(window - stride, target - 100)
                seen.append(target)
    assert seen == tokens[1:]


class ByteTokenizer:
    """One token a character, the way transformers' tokenizers are called."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % 64 for character in text]}


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
        max_positions=32,
    )  # fmt: skip
    model = Transformer(config)
    model.reset_parameters(std=0.2)
    return model


def evaluate(model: Transformer, text: str, *arguments: int, **named: int) -> EvalResult:
    tokens = text_tokens(ByteTokenizer(), text)
    return held_out_loss(model, text_windows(model.config, tokens, *arguments, **named))


def test_the_loss_is_that_of_each_window_by_itself(model: Transformer) -> None:
    text = "The quick brown fox jumps over the lazy dog, twice."
    ids = torch.tensor([ord(character) % 64 for character in text])
    total, window, stride = 0.0, 16, 4
    for target in range(1, len(ids)):
        # The first window, of those at multiples of the stride, that reaches this target.
        begin = max(0, -(-(target - window) // stride)) * stride
        context = ForwardContext(DenseAttention(1, target - begin))
        with torch.no_grad():
            hidden = model(ids[begin:target], torch.arange(target - begin), context)
            total -= model.logits(hidden[-1:], context).log_softmax(-1)[0, ids[target]].item()
    result = evaluate(model, text, window, stride)
    assert result.tokens == len(ids) - 1
    assert result.loss == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_max_tokens_counts_targets(model: Transformer) -> None:
    assert evaluate(model, "abcdefgh" * 9, 16, max_tokens=21).tokens == 21


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 33}, "sequence_length = 33.*32"),
        ({"window": 8, "stride": 9}, "stride = 9.*8"),
        ({"window": 8, "max_tokens": 0}, "max_tokens = 0"),
    ],
)
def test_impossible_windows_are_refused(model: Transformer, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(model, "some text", **arguments)


def test_too_short_a_text_is_refused(model: Transformer) -> None:
    with pytest.raises(UserError, match="0 tokens"):
        evaluate(model, "a", 8)
