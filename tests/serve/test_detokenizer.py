"""Pieces of text, joined, are the whole text; nothing is withheld for long."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from moeforge.serve.detokenizer import Detokenizer

HALF = "\N{REPLACEMENT CHARACTER}"
WORDS = ["▁Hello", "▁world", "ing", "▁", "▁▁", ".", "日", "▁日本", "🙂", "\n", "a", HALF]


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's way: ▁ for spaces, the first one dropped, single bytes where a character has no token."""
    vocabulary = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerFast:
    from moeforge.checkpoint import open_checkpoint
    from moeforge.cli.quickstart import packaged_model

    tokenizer: PreTrainedTokenizerFast = open_checkpoint(packaged_model()).tokenizer()
    return tokenizer


def pieces(tokenizer: Any, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    """What each token adds, then what is left."""
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.append(token) for token in ids), detokenizer.flush()]


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def after(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    return whole(tokenizer, prompt + ids)[len(whole(tokenizer, prompt)) :]


def check(tokenizer: Any, ids: list[int], prompt: list[int] | None = None) -> None:
    parts = pieces(tokenizer, ids, prompt)
    assert "".join(parts) == after(tokenizer, prompt or [], ids)
    assert len(parts[-1]) <= 1 and not parts[-1].strip(HALF)


@given(st.lists(st.integers(0, 263), max_size=120))  # with ids that the tokenizer does not have
def test_any_bytes(tokenizer: Any, ids: list[int]) -> None:
    check(tokenizer, ids)
    check(tokenizer, ids, tokenizer("Say: ")["input_ids"])


@given(st.lists(st.sampled_from([0x80, 0xBF, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0xFF, 0x41]), max_size=120))
def test_bytes_that_are_no_characters(tokenizer: Any, values: list[int]) -> None:
    ids = [token for value in values for token in tokenizer.convert_tokens_to_ids([letter(value)])]
    check(tokenizer, ids)
    assert "".join(pieces(tokenizer, ids)) == bytes(values).decode(errors="replace")


def letter(value: int) -> str:
    """GPT-2's letter for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(value) if value in printable else chr(256 + sum(v not in printable for v in range(value)))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 49151), max_size=60))
def test_any_tokens_of_a_real_tokenizer(smollm2: Any, ids: list[int]) -> None:
    check(smollm2, ids)
    check(smollm2, ids, smollm2("<|im_start|>user\nSay:")["input_ids"])


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_of_a_real_tokenizer(smollm2: Any, text: str) -> None:
    ids = smollm2(text)["input_ids"]
    check(smollm2, ids)
    seen = ""
    for piece in pieces(smollm2, ids):  # never anything that is taken back
        seen += piece
        assert whole(smollm2, ids).startswith(seen)


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(min_size=1, max_size=2), st.just("</s>")), max_size=40))
def test_sentencepiece(sentencepiece: Any, parts: list[str]) -> None:
    ids = []
    for part in parts:
        if part in WORDS or part == "</s>":
            ids.append(sentencepiece.convert_tokens_to_ids(part))
        else:
            ids += [3 + byte for byte in part.encode()]
    check(sentencepiece, ids)
    prompts = ["▁Hello"], ["<s>"], ["<s>", "▁Hello", "</s>"], ["▁日本", "<s>", "<s>"]
    for prompt in prompts:
        check(sentencepiece, ids, sentencepiece.convert_tokens_to_ids(prompt))


def test_sentencepiece_keeps_the_space_after_a_special_token(sentencepiece: Any) -> None:
    ids = sentencepiece.convert_tokens_to_ids(["▁Hello", "</s>", "▁world", "<s>", "<s>", "▁world"])
    assert "".join(pieces(sentencepiece, ids)) == "Hello world world"


@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xE4])
def test_endless_invalid_bytes_come_out(tokenizer: Any, sentencepiece: Any, byte: int) -> None:
    for made, token in ((tokenizer, tokenizer.convert_tokens_to_ids(letter(byte))), (sentencepiece, 3 + byte)):
        detokenizer = Detokenizer(made)
        seen = 0
        for count in range(1, 200):
            seen += len(detokenizer.append(token))
            assert count - 1 <= seen <= count
        assert len(detokenizer._window) <= 33
        assert seen + len(detokenizer.flush()) == 199


def test_valid_characters_come_out_after_invalid_fallback_bytes(sentencepiece: Any) -> None:
    ids = [3 + byte for byte in b"\xff" + "你好世界".encode() * 12]
    assert "".join(pieces(sentencepiece, ids)).endswith("你好世界你好世界")


def test_each_character_comes_when_it_is_whole(tokenizer: Any) -> None:
    text = "naïve 日本 🙂!"
    parts = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert [part for part in parts if part] == list(text)


def test_a_prompt_that_ends_amid_a_character(tokenizer: Any) -> None:
    ids = tokenizer("日本")["input_ids"]
    assert "".join(pieces(tokenizer, ids[1:], ids[:1])) == HALF * 2 + "本"


def test_a_tokenizer_in_python(tokenizer: Any) -> None:
    class Slow:
        convert_tokens_to_ids = tokenizer.convert_tokens_to_ids

        def decode(self, ids: list[int], **options: bool) -> str:
            assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return whole(tokenizer, ids)

    ids = tokenizer("a日b</s>c")["input_ids"]
    assert pieces(Slow(), ids) == ["a", "", "", "日", "b", "", "c", ""]
