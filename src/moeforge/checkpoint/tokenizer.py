"""The tokenizer beside the weights: loaded through transformers, copied from model to model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeforge.checkpoint.source import first_line
from moeforge.errors import UserError

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer's own files in a model directory; none for a GGUF file, which holds it inside."""
    return [] if path.is_file() else [path / name for name in _FILES if (path / name).is_file()]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory or GGUF file, without running code that lies there.

    Raises UserError if none can be loaded.
    """
    try:
        with _quiet():
            return _load(path)
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs code that lies beside it, which is never run; a tokenizer.json would do without"
        if (path / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            reason = "its tokenizer.model needs the package sentencepiece: pip install sentencepiece"
        raise UserError(f"{path}: no tokenizer can be loaded from it ({reason})") from error


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer, LlamaTokenizer

    if path.is_file():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        return _without_additions(tokenizer)
    if _class_name(path) == "SkyworkTokenizer":
        # Skywork's class is remote code around Llama's SentencePiece tokenizer (formats.md 1).
        return LlamaTokenizer.from_pretrained(path, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says about a model_type that it does not know: only the tokenizer is read."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a fast tokenizer's files, for transformers 4 and 5."""
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    settings = directory / "tokenizer_config.json"
    # transformers 4 knows the class by this name only, transformers 5 by both.
    config = {**json.loads(settings.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _class_name(path: Path) -> str | None:
    file = path / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None


def _without_additions(tokenizer: Any) -> Any:
    """Without tokens that the GGUF file does not have.

    transformers builds byte-level tokenizers as GPT-2's, whose `<|endoftext|>` it appends where the file has
    none (Llama 3's has none): a row that the embedding does not have either.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not isinstance(state["model"]["vocab"], dict):
        return tokenizer
    size = max(state["model"]["vocab"].values()) + 1
    added = [token for token in state["added_tokens"] if token["id"] < size]
    if added == state["added_tokens"]:
        return tokenizer
    backend = Tokenizer.from_str(json.dumps({**state, "added_tokens": added}))
    special = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **special,
    )
