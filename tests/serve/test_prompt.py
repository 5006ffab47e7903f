"""Texts and conversations to token ids."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from moeforge.errors import UserError
from moeforge.serve.prompt import encode, render_chat


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def test_text_becomes_the_tokenizers_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "naïve")
    assert ids == tokenizer("naïve")["input_ids"] and len(ids) == 6
    assert encode(tokenizer, "") == []
    assert encode(tokenizer, "x" * 5000) == encode(tokenizer, "x") * 5000  # without a warning that it is long


def test_a_special_token_is_put_first_only_where_wanted(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    assert encode(changed, "a") == [256, *encode(changed, "a", add_special_tokens=False)]
    assert len(encode(changed, "a", add_special_tokens=False)) == 1


def test_the_template_writes_the_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert render_chat(tokenizer, conversation) == "<system>be\n<user>hi\n<assistant>"
    assert conversation == [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template; give a plain prompt"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation .roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation"),
        ("{% for m in messages %}", "refuses the conversation"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "refuses the conversation"),
        ("{{ messages[7].content.strip() }}", "refuses the conversation"),
        ("{% for i in range(100000000) %}{% endfor %}", "refuses the conversation"),
    ],
)
def test_what_a_template_cannot_do_is_one_clear_error(
    tokenizer: PreTrainedTokenizerFast, template: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        render_chat(with_template(tokenizer, template), [{"role": "user", "content": "hi"}])
