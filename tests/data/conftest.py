"""A small real tokenizer (byte-level BPE with ChatML specials), and caches of known streams."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moeforge.data import TokenCache, TokenStream

# SmolLM2's: ChatML, a default system prompt, no {% generation %}.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog.\n",
    "def forward(self, tokens):\n    return tokens\n",
] * 20


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    def make(**options: object) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(TEXT, trainer)
        defaults = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **(defaults | options))
        tokenizer.chat_template = CHATML
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., TokenCache]:
    """A cache in memory with documents of given lengths; token i of the stream is first + i."""

    def make(
        lengths: list[int],
        first: int = 0,
        weight: float = 1.0,
        loss: list[bool] | None = None,
        name: str = "made",
    ) -> TokenCache:
        total = sum(lengths)
        stream = TokenStream(
            np.arange(first, first + total, dtype=np.uint32),
            np.cumsum([0, *lengths[:-1]]).astype(np.int64)[: len(lengths)],
            None if loss is None else np.packbits(np.array(loss, bool), bitorder="little"),
        )
        counts = {
            "tokens": total,
            "documents": len(lengths),
            "loss_tokens": total if loss is None else sum(loss),
            "content": f"{lengths} {first} {loss}",
        }
        meta = {
            "source": {"path": name},
            "chat": loss is not None,
            "eos_id": 7,
            "tokenizer_fingerprint": "one",
            "splits": {"train": counts, "held_out": counts},
        }
        return TokenCache(Path(name), meta, stream, stream, weight)

    return make
