"""Building token caches: tokenise once, into a temporary name, rename when complete."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from moeforge.data.cache import SPLITS, VERSION, TokenCache
from moeforge.data.encode import Encoder
from moeforge.data.reading import read_pieces
from moeforge.data.source import Source, corpus_files
from moeforge.data.writer import StreamWriter
from moeforge.errors import RunError, UserError, no_room

Progress = Callable[[int], None]


def build_cache(
    sources: Iterable[Any],
    tokenizer: Any,
    cache_dir: str | Path,
    *,
    holdout_fraction: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TokenCache]:
    """Token caches of all sources, one each, tokenising those that are not in `cache_dir` yet.

    sources           Sources, or anything with their attributes (`path`, `weight`, ...)
    holdout_fraction  share of whole documents held out of each source, chosen by a hash of (seed, index). At
                      least one where there are two (the last), but the tail of a document that is most of the
                      source. 0: none; 1: all of it, a corpus for evaluation
    progress          called with the number of tokens written so far by this call

    A cache is named by a hash of the tokenizer, the source, its files' names, sizes and times, the seed and
    the share. Builders of the same cache in other processes wait for the first. Raises UserError for bad
    input, RunError for a full disk; in both cases nothing is left that could be taken for a cache.
    """
    if not 0 <= holdout_fraction <= 1:
        raise UserError(f"data.holdout_fraction {holdout_fraction}: must lie between 0 and 1")
    root = Path(cache_dir).expanduser()
    caches: list[TokenCache] = []
    written = 0

    def advance(tokens: int) -> None:
        nonlocal written
        written += tokens
        if progress is not None:
            progress(written)

    for source in map(Source.of, sources):
        encoder = Encoder(tokenizer, chat=source.messages_field is not None)
        name = _fingerprint(source, encoder, holdout_fraction, seed)
        final = root / name
        try:
            if not final.exists():  # a finished cache may lie where nothing can be written
                root.mkdir(parents=True, exist_ok=True)
                with FileLock(root / f".{name}.lock"):
                    if not final.exists():
                        _build(source, encoder, final, holdout_fraction, seed, advance)
        except OSError as error:
            reason = f"data.cache_dir {str(root)!r}: cannot write the token cache of {source.path!r} ({error.strerror})"
            if no_room(error):
                raise RunError(f"{reason}; nothing of it was kept") from error
            raise UserError(f"{reason}; name a directory that can be written") from error
        caches.append(TokenCache.open(final, source.weight))
    return caches


def _build(
    source: Source, encoder: Encoder, final: Path, holdout_fraction: float, seed: int, advance: Progress
) -> None:
    """Writes the cache of one source; the caller holds its lock, so a temporary one is a dead builder's."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    writers = {split: StreamWriter(temporary / split, encoder.dtype, encoder.chat) for split in SPLITS}
    try:
        _write_documents(source, encoder, writers, holdout_fraction, seed, advance)
        _check(source, writers)
        if 0 < holdout_fraction < 1 and not writers["held_out"].documents:
            _hold_out_the_end(source, writers["train"], writers["held_out"], holdout_fraction)
        meta = {
            "version": VERSION,
            "source": _definition(source),
            "chat": encoder.chat,
            "tokenizer": encoder.name,
            "tokenizer_fingerprint": encoder.fingerprint(),
            "vocab_size": len(encoder.tokenizer),
            "eos_id": encoder.eos_id,
            "dtype": encoder.dtype.name,
            "holdout_fraction": holdout_fraction,
            "seed": seed,
            "splits": {split: writer.close() for split, writer in writers.items()},
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
        temporary.rename(final)
    finally:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)


def _write_documents(
    source: Source,
    encoder: Encoder,
    writers: dict[str, StreamWriter],
    holdout_fraction: float,
    seed: int,
    advance: Progress,
) -> None:
    index, writer = 0, None
    for ids, loss, last in encoder.encode(read_pieces(source)):
        if len(ids):
            if writer is None:
                writer = writers["held_out" if _held_out(holdout_fraction, seed, index) else "train"]
                writer.begin_document()
            writer.extend(ids, loss)
            advance(len(ids))
        if last:
            index += writer is not None
            writer = None


def _held_out(fraction: float, seed: int, index: int) -> bool:
    """Whether a document is held out. The first never is, so that something remains to train on."""
    if fraction in (0, 1) or index == 0:
        return fraction == 1
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _hold_out_the_end(source: Source, train: StreamWriter, held_out: StreamWriter, fraction: float) -> None:
    """Where the hash chose no document: the last one, or its tail if it is most of the corpus."""
    begin = train.last_document()
    if train.tokens - begin > train.tokens / 2:
        tail = max(2, round(fraction * train.tokens))
        if train.tokens - begin < tail + 2:
            raise UserError(
                f"data path {source.path!r}: {train.tokens} tokens are too few to hold some out; "
                f"give more data or set data.holdout_fraction to 0"
            )
        begin = train.tokens - tail
    train.move_tail(begin, held_out)


def _check(source: Source, writers: dict[str, StreamWriter]) -> None:
    if not any(writer.tokens for writer in writers.values()):
        raise UserError(f"data path {source.path!r}: empty, no tokens in it")
    if not any(writer.loss_tokens for writer in writers.values()):
        raise UserError(f"data path {source.path!r}: no assistant turn in any {source.messages_field!r}")


def _definition(source: Source) -> dict[str, Any]:
    """What decides the content of a source's cache. The weight does not: it only decides how it is read."""
    keys = ("path", "format", "text_field", "messages_field", "split")
    return {key: getattr(source, key) for key in keys}


def _fingerprint(source: Source, encoder: Encoder, holdout_fraction: float, seed: int) -> str:
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(json.dumps(part).encode() + b"\n")

    add([VERSION, encoder.fingerprint(), _definition(source), holdout_fraction, seed])
    if encoder.chat:
        add(encoder.tokenizer.chat_template)
    for document in source.documents or ():
        add(document)
    for file in corpus_files(source):
        stat = file.path.stat()
        add([str(file.path), file.format, stat.st_size, stat.st_mtime_ns])
    return digest.hexdigest()[:24]
