"""From what a user gives to the token ids of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeforge.errors import UserError

Message = dict[str, Any]


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, with the model's begin token where its tokenizer puts one."""
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def render_chat(tokenizer: Any, conversation: Sequence[Message], **options: Any) -> str:
    """The text of a conversation up to where the assistant answers, by the checkpoint's template and its `options`.

    transformers renders in a sandbox that reaches nothing outside the messages. Raises UserError where there is no
    template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise UserError("chat: the model's tokenizer has no chat template; give a plain prompt instead")
    try:
        return str(
            tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True, **options)
        )
    except Exception as error:  # a template is code, and may raise anything
        raise UserError(f"chat: the chat template refuses the conversation ({error})") from error
