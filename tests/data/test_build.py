import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeforge.data import PackedDataset, Source, TokenCache, build_cache
from moeforge.data.writer import StreamWriter
from moeforge.errors import RunError, UserError

TEXTS = [f"The fox number {i} jumps over the lazy dog.\n" for i in range(200)]


def texts(stream, tokenizer) -> list[str]:
    parts = np.split(np.asarray(stream.tokens), stream.starts[1:]) if len(stream) else []
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in parts]


def finished(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if not path.name.endswith(".lock")]


def test_built_once_then_opened(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    seen: list[int] = []
    source = Source(str(tmp_path / "a.txt"))
    (first,) = build_cache([source], tokenizer, tmp_path / "cache", progress=seen.append)
    assert seen[-1] == len(first.train)
    changed = (first.directory / "train/tokens.bin").stat().st_mtime_ns
    (second,) = build_cache([source], tokenizer, tmp_path / "cache", progress=seen.append)
    assert second.directory == first.directory and len(seen) == 1
    assert (second.directory / "train/tokens.bin").stat().st_mtime_ns == changed


def test_what_changes_the_tokens_changes_the_name(tmp_path: Path, tokenizer, make_tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": t, "body": t}) for t in TEXTS))
    other = make_tokenizer(eos_token="<|im_end|>")

    def name(source: Source, tok=tokenizer, **options: float) -> str:
        return build_cache([source], tok, tmp_path / "cache", **options)[0].directory.name

    names = [
        name(Source(str(file))),
        name(Source(str(file), text_field="body")),
        name(Source(str(file)), other),
        name(Source(str(file)), holdout_fraction=0.1),
        name(Source(str(file)), holdout_fraction=0.1, seed=1),
    ]
    assert len(set(names)) == len(names)
    assert name(Source(str(file), weight=3.0)) == names[0]
    file.write_text(json.dumps({"text": "new"}))
    assert name(Source(str(file))) not in names


def test_several_sources_and_their_weights(tmp_path: Path, tokenizer) -> None:
    sources = [Source("a", documents=TEXTS), Source("b", 0.5, documents=TEXTS[:50])]
    caches = build_cache(sources, tokenizer, tmp_path)
    assert [(cache.label, cache.weight) for cache in caches] == [("a", 1.0), ("b", 0.5)]
    assert len(PackedDataset(caches, 8)) > 0


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(2, 40), st.sampled_from([0.01, 0.1, 0.5, 0.9]), st.integers(0, 99))
def test_whole_documents_are_held_out(tmp_path_factory, tokenizer, count: int, fraction: float, seed: int) -> None:
    directory = tmp_path_factory.mktemp("cache")
    source = Source("memory", documents=TEXTS[:count])
    (cache,) = build_cache([source], tokenizer, directory, holdout_fraction=fraction, seed=seed)
    train, held_out = texts(cache.train, tokenizer), texts(cache.held_out, tokenizer)
    assert sorted(train + held_out) == sorted(TEXTS[:count])
    assert train and held_out


def test_share_of_documents_held_out(tmp_path: Path, tokenizer) -> None:
    source = Source("memory", documents=TEXTS * 10)
    (cache,) = build_cache([source], tokenizer, tmp_path, holdout_fraction=0.1)
    assert 150 < cache.meta["splits"]["held_out"]["documents"] < 250


def test_tail_of_a_single_document_is_held_out(tmp_path: Path, tokenizer) -> None:
    source = Source("memory", documents=["".join(TEXTS)])
    (cache,) = build_cache([source], tokenizer, tmp_path, holdout_fraction=0.1)
    total = len(cache.train) + len(cache.held_out)
    assert len(cache.held_out) == round(0.1 * total)
    assert "".join(texts(cache.train, tokenizer) + texts(cache.held_out, tokenizer)) == "".join(TEXTS)


def test_nothing_or_all_held_out(tmp_path: Path, tokenizer) -> None:
    source = Source("memory", documents=TEXTS)
    (none,) = build_cache([source], tokenizer, tmp_path, holdout_fraction=0)
    (all_of_it,) = build_cache([source], tokenizer, tmp_path, holdout_fraction=1)
    assert len(none.held_out) == len(all_of_it.train) == 0
    assert (none.train.tokens == all_of_it.held_out.tokens).all()


@pytest.mark.parametrize(
    ("documents", "options", "words"),
    [
        ([], {}, "'memory': empty, no tokens"),
        (["", ""], {}, "'memory': empty, no tokens"),
        (["a"], {"holdout_fraction": 0.1}, "too few to hold some out"),
        (["a"], {"holdout_fraction": 1.5}, "holdout_fraction 1.5: must lie between 0 and 1"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path: Path, tokenizer, documents, options, words) -> None:
    with pytest.raises(UserError, match=words):
        build_cache([Source("memory", documents=documents)], tokenizer, tmp_path, **options)
    assert finished(tmp_path) == []


def test_error_in_the_middle_leaves_nothing(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "a"}'] * 3000 + ["{"]))
    with pytest.raises(UserError, match="line 3001"):
        build_cache([Source(str(tmp_path / "a.jsonl"))], tokenizer, tmp_path / "cache")
    assert finished(tmp_path / "cache") == []


def test_chat_without_an_assistant(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"m": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(UserError, match="no assistant turn"):
        build_cache([Source(str(tmp_path / "a.jsonl"), messages_field="m")], tokenizer, tmp_path / "cache")


def test_full_disk(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StreamWriter, "extend", full)
    with pytest.raises(RunError, match="No space left on device.*nothing of it was kept"):
        build_cache([Source("memory", documents=TEXTS)], tokenizer, tmp_path)
    assert finished(tmp_path) == []


def _build(directory: Path, tokenizer, results, delay: float = 0.0) -> None:
    def documents():
        yield from TEXTS * 20

    built: list[int] = []

    def slow(tokens: int) -> None:
        built.append(tokens)
        if delay and tokens > 500:
            time.sleep(delay)

    source = Source("memory", documents=documents())
    (cache,) = build_cache([source], tokenizer, directory, holdout_fraction=0.1, progress=slow)
    results.put((cache.directory.name, len(cache.train), bool(built)))


def test_concurrent_builders_share_one_cache(tmp_path: Path, tokenizer) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    builders = [context.Process(target=_build, args=(tmp_path, tokenizer, results)) for _ in range(3)]
    for builder in builders:
        builder.start()
    answers = [results.get() for _ in builders]
    for builder in builders:
        builder.join(30)
    assert len({answer[:2] for answer in answers}) == 1
    assert sum(built for _, _, built in answers) == 1
    assert [path.name for path in finished(tmp_path)] == [answers[0][0]]


def test_a_killed_builder_leaves_nothing_taken_for_complete(tmp_path: Path, tokenizer) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    builder = context.Process(target=_build, args=(tmp_path, tokenizer, results, 30.0))
    builder.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert builder.pid is not None
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    left = finished(tmp_path)
    assert left and all(path.name.startswith(".") for path in left)
    _build(tmp_path, tokenizer, results)
    (cache,) = finished(tmp_path)
    assert not cache.name.startswith(".") and TokenCache.open(cache).train.tokens.size == results.get()[1]


def test_a_finished_cache_opens_where_nothing_can_be_written(tmp_path: Path, tokenizer, monkeypatch) -> None:
    source = Source("memory", documents=TEXTS)
    (built,) = build_cache([source], tokenizer, tmp_path)

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("moeforge.data.build.FileLock", refuse)
    assert build_cache([source], tokenizer, tmp_path)[0].directory == built.directory
    with pytest.raises(UserError, match="Read-only"):
        build_cache([source], tokenizer, tmp_path, seed=1)
