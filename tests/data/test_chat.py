from pathlib import Path

import numpy as np
import pytest

from moeforge.data import PackedDataset, Source, build_cache
from moeforge.data.chat import encode_chats
from moeforge.errors import UserError

CHAT = [
    {"role": "user", "content": "What does the fox do?"},
    {"role": "assistant", "content": "It jumps over the lazy dog. "},
    {"role": "user", "content": "Why? It jumps over the lazy dog."},
    {"role": "assistant", "content": "The dog is lazy."},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: thoughts are kept in the last turn only, so earlier renderings are no prefixes of later ones.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1].strip() }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learnt(tokenizer, chat: list[dict]) -> list[str]:
    """The texts under loss, one for each run of tokens."""
    ids, loss = encode_chats(tokenizer, [chat], ["here"])[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss.astype(int), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


def with_template(make_tokenizer, template: str | None):
    tokenizer = make_tokenizer(name_or_path="small")
    tokenizer.chat_template = template
    return tokenizer


def test_ids_are_those_of_the_template(tokenizer) -> None:
    ids, loss = encode_chats(tokenizer, [CHAT], ["here"])[0]
    assert ids.tolist() == tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    assert len(loss) == len(ids)


def test_loss_on_assistant_turns_and_their_ends_only(tokenizer) -> None:
    assert learnt(tokenizer, CHAT) == ["It jumps over the lazy dog. <|im_end|>", "The dog is lazy.<|im_end|>"]


def test_system_prompt_and_assistant_first(tokenizer) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello"}, *CHAT[2:]]
    assert learnt(tokenizer, chat) == ["Hello<|im_end|>", "The dog is lazy.<|im_end|>"]
    assert learnt(tokenizer, chat[1:]) == ["Hello<|im_end|>", "The dog is lazy.<|im_end|>"]


def test_template_that_marks_the_assistant(make_tokenizer) -> None:
    tokenizer = with_template(make_tokenizer, MARKED)
    assert learnt(tokenizer, CHAT) == ["It jumps over the lazy dog. <|im_end|>", "The dog is lazy.<|im_end|>"]


def test_template_that_rewrites_earlier_turns(make_tokenizer) -> None:
    tokenizer = with_template(make_tokenizer, FORGETFUL)
    chat = [dict(message) for message in CHAT]
    chat[1]["content"] = "<think>hm</think>It jumps over the lazy dog."
    assert learnt(tokenizer, chat) == [
        "It jumps over the lazy dog.<|im_end|>",
        "<think>\n\n</think>\n\nThe dog is lazy.<|im_end|>",
    ]


def test_turns_that_cannot_be_told_apart_are_refused(make_tokenizer) -> None:
    tokenizer = with_template(
        make_tokenizer, "{% for m in messages %}{{ m['content'] | upper }}{{ loop.last }}{% endfor %}"
    )
    with pytest.raises(UserError, match="here: .*cannot be found"):
        learnt(tokenizer, CHAT)


def test_no_template_and_a_conversation_it_refuses(make_tokenizer, tokenizer) -> None:
    with pytest.raises(UserError, match="'small' has no chat template"):
        learnt(with_template(make_tokenizer, None), CHAT)
    with pytest.raises(UserError, match="here: the chat template refuses it"):
        learnt(tokenizer, [{"role": "user"}])


def test_targets_of_a_chat_corpus(tmp_path: Path, tokenizer) -> None:
    import json

    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(5)))
    (cache,) = build_cache(
        [Source(str(tmp_path / "chat.jsonl"), messages_field="messages")], tokenizer, tmp_path / "cache"
    )
    ids, loss = encode_chats(tokenizer, [CHAT], ["here"])[0]
    dataset = PackedDataset(cache, len(ids))
    batch = dataset.batch(0, 5)
    expected = np.where(loss, ids, -100)[1:]
    assert all(row[:-1].tolist() == expected.tolist() for row in batch.targets)
    assert (batch.targets[:, -1] == -100).all()
    assert cache.meta["splits"]["train"]["loss_tokens"] == 5 * loss.sum()
