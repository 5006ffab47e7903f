"""Chat conversations as tokens, with loss on what the assistant said and on the token that ends its turn."""

import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from moeforge.errors import UserError

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chats(
    tokenizer: Any, chats: Sequence[Messages], where: Sequence[str]
) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Token ids and loss mask of every conversation, rendered by the tokenizer's chat template.

    A template with {% generation %} marks the assistant's part itself; for the others it is found by
    comparing renderings of the conversation's beginnings. Nothing is added to what the template writes.
    Raises UserError: no template, a conversation that it refuses, or turns that cannot be told apart.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(f"messages_field: tokenizer {tokenizer.name_or_path!r} has no chat template")
    if _GENERATION.search(tokenizer.chat_template):
        return [_encode_marked(tokenizer, chat, at) for chat, at in zip(chats, where, strict=True)]
    texts, spans = [], []
    for chat, at in zip(chats, where, strict=True):
        texts.append(_render(tokenizer, chat, at))
        spans.append(_assistant_spans(tokenizer, chat, texts[-1], at))
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    pairs = []
    for ids, offsets, chat_spans in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        edges = np.asarray(offsets, np.int64).reshape(-1, 2)
        loss = np.zeros(len(ids), bool)
        for begin, end in chat_spans:
            loss |= (edges[:, 0] < end) & (edges[:, 1] > begin)
        pairs.append((np.asarray(ids, np.int64), loss))
    return pairs


def _encode_marked(tokenizer: Any, chat: Messages, where: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    try:
        encoded = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UserError(f"{where}: the chat template refuses it ({error})") from error
    ids = np.asarray(encoded["input_ids"], np.int64)
    loss = np.asarray(encoded["assistant_masks"], bool)
    # Some templates close the turn outside their mark; without that token the model never learns to stop.
    after = np.flatnonzero(loss[:-1] & ~loss[1:]) + 1
    loss[after[np.isin(ids[after], tokenizer.all_special_ids)]] = True
    return ids, loss


def _assistant_spans(tokenizer: Any, chat: Messages, text: str, where: str) -> Spans:
    """Character ranges of the assistant's turns in the rendered text, end-of-turn token included."""
    spans: Spans = []
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        begin = _prefix_length(tokenizer, chat[:turn], text, generate=True)
        end = _prefix_length(tokenizer, chat[: turn + 1], text, generate=False)
        if begin is None or end is None or begin > end:
            # A template that rewrites earlier turns (Qwen3 drops their thoughts): look for the words.
            after = begin or (spans[-1][1] if spans else 0)
            begin, end = _find_content(tokenizer, message, text, after, where)
        spans.append((begin, begin + len(text[begin:end].rstrip())))
    return spans


def _prefix_length(tokenizer: Any, chat: Messages, text: str, generate: bool) -> int | None:
    """Length of the rendering of a conversation's beginning, None if the whole does not begin so."""
    if not chat:
        return None
    try:
        prefix = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
    except (jinja2.TemplateError, TypeError, KeyError):
        return None
    return len(prefix) if text.startswith(prefix) else None


def _find_content(tokenizer: Any, message: dict[str, Any], text: str, begin: int, where: str) -> tuple[int, int]:
    content = message.get("content")
    words = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    at = text.find(words, begin) if words else -1
    if at < 0:
        raise UserError(
            f"{where}: its assistant turns cannot be found in what the chat template of "
            f"{tokenizer.name_or_path!r} writes; use a template with {{% generation %}}"
        )
    end = at + len(words)
    for special in tokenizer.all_special_tokens:
        if text.startswith(special, end):
            return at, end + len(special)
    return at, end


def _render(tokenizer: Any, chat: Messages, where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UserError(f"{where}: the chat template refuses it ({error})") from error
