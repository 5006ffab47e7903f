import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.data import Batch, PackedDataset, Source, build_cache
from moeforge.errors import UserError

lengths_st = st.lists(st.integers(1, 12), min_size=1, max_size=12)
FIELDS = ("tokens", "targets", "positions", "documents")


def assert_equal(one: Batch, two: Batch) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def by_hand(tokens: list[int], starts: list[int], loss: list[bool], window: int, s: int, eos: int) -> list[list[int]]:
    """One row, token by token: the definition, slowly."""
    owner = [max(d for d, start in enumerate(starts) if start <= i) for i in range(len(tokens))]
    rows: list[list[int]] = [[], [], [], []]
    for i in range(window * s, window * s + s):
        if i >= len(tokens):
            values = (eos, -100, 0, -1)
        else:
            follows = i + 1 < len(tokens) and owner[i + 1] == owner[i] and loss[i + 1]
            values = (
                tokens[i],
                tokens[i + 1] if follows else -100,
                i - max(starts[owner[i]], window * s),
                owner[i] - owner[window * s],
            )
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    return rows


@given(lengths_st, st.integers(1, 10), st.integers(0, 3), st.randoms())
def test_rows_are_the_windows_of_the_stream(make_cache, lengths, s, seed, random) -> None:
    loss = [random.random() < 0.7 for _ in range(sum(lengths))]
    loss[-1] = True
    if sum(lengths) < max(2, s):
        return
    cache = make_cache(lengths, first=100, loss=loss)
    dataset = PackedDataset(cache, s, seed)
    batch = dataset.batch(0, len(dataset))
    stream = cache.train
    rows = {
        tuple(map(tuple, by_hand(stream.tokens.tolist(), stream.starts.tolist(), loss, w, s, 7)))
        for w in range(len(dataset))
    }
    read = {tuple(tuple(getattr(batch, name)[b].tolist()) for name in FIELDS) for b in range(len(dataset))}
    assert read == rows


@given(lengths_st, st.integers(1, 10), st.integers(0, 5))
def test_an_epoch_reads_and_predicts_every_token_once(make_cache, lengths, s, epoch) -> None:
    total = sum(lengths)
    if total < max(2, s):
        return
    dataset = PackedDataset(make_cache(lengths), s, seed=3)
    batch = dataset.batch(epoch * len(dataset), len(dataset))
    read = sorted(batch.tokens[batch.documents >= 0].tolist())
    assert read in (list(range(total)), list(range(total - 1)))  # the last token may be a target only
    starts = np.cumsum([0, *lengths])
    predicted = sorted(batch.targets[batch.targets != -100].tolist())
    assert predicted == sorted(set(range(total)) - set(starts.tolist()))


@given(
    st.lists(st.tuples(lengths_st, st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(0, 60),
    st.integers(1, 20),
)
def test_order_depends_on_the_position_only(make_cache, parts, s, position, count) -> None:
    caches = [make_cache(lengths, 1000 * i, weight) for i, (lengths, weight) in enumerate(parts)]
    if sum(map(len, (cache.train for cache in caches))) < s or not any(len(c.train) > 1 for c in caches):
        return
    whole = PackedDataset(caches, s, seed=1).batch(position, count)
    fresh = PackedDataset(caches, s, seed=1)
    singly = [fresh.batch(n, 1) for n in reversed(range(position, position + count))][::-1]
    for row, one in enumerate(singly):
        assert_equal(whole.slice(row, row + 1), one)


def test_documents_are_not_crossed_and_positions_restart(make_cache) -> None:
    batch = PackedDataset(make_cache([3, 4, 2]), 9).batch(0, 1)
    assert batch.tokens[0].tolist() == list(range(9))
    assert batch.targets[0].tolist() == [1, 2, -100, 4, 5, 6, -100, 8, -100]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.documents[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [getattr(batch, name).dtype for name in FIELDS] == [torch.int64] * 3 + [torch.int32]


def test_last_window_is_padded(make_cache) -> None:
    dataset = PackedDataset(make_cache([6]), 4)
    batch = dataset.batch(0, len(dataset))
    last = int(batch.tokens[:, 0].argmax())
    short = batch.slice(last, last + 1)
    assert short.tokens[0].tolist() == [4, 5, 7, 7]
    assert short.targets[0].tolist() == [5, -100, -100, -100]
    assert short.documents[0].tolist() == [0, 0, -1, -1]


def test_weights_decide_how_often_a_source_is_read_in_training(make_cache) -> None:
    caches = [make_cache([40], 0, 2.0), make_cache([40], 1000, 0.5), make_cache([40], 2000, 0.0)]
    dataset = PackedDataset(caches, 4)
    assert len(dataset) == 20 + 5
    tokens = dataset.batch(0, 25).tokens
    assert int((tokens < 1000).sum()) == 80 and int((tokens >= 2000).sum()) == 0
    assert len(PackedDataset(caches, 4, split="held_out")) == 30


def test_seed_changes_the_order(make_cache) -> None:
    cache = make_cache([400])
    one, two = (PackedDataset(cache, 4, seed).batch(0, 50).tokens for seed in (0, 1))
    assert not torch.equal(one, two)


def test_identity_follows_the_content_not_the_file(tmp_path: Path, tokenizer, make_tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"The fox number {i} jumps"}) for i in range(40)]

    def identity(path: Path = file, tok=tokenizer, weight: float = 1.0, s: int = 8, seed: int = 0, **options) -> str:
        caches = build_cache([Source(str(path), weight)], tok, tmp_path / "cache", holdout_fraction=0.2)
        return PackedDataset(caches, s, seed, **options).identity()

    file.write_text("\n".join(lines))
    first, held_out = identity(), identity(split="held_out")
    os.utime(file, (1, 1))
    assert (identity(), identity(split="held_out")) == (first, held_out)
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(file.read_bytes())
    assert identity(copy) == first
    assert len(list((tmp_path / "cache").iterdir())) > 2, "read anew each time"
    assert identity(split="held_out", weight=2.0) == held_out
    others = [
        identity(weight=2.0),
        identity(s=9),
        identity(seed=1),
        identity(tok=make_tokenizer(eos_token="<|im_end|>")),
    ]
    lines[0] = lines[0].replace("jumps", "jumbs")
    file.write_text("\n".join(lines))
    os.utime(file, (2, 2))
    assert len({first, held_out, *others, identity()}) == 7


def test_too_little_data_is_said(make_cache) -> None:
    with pytest.raises(UserError, match="sequence_length 16: the training part of 'made' has only 9 tokens"):
        PackedDataset(make_cache([9]), 16)
    assert len(PackedDataset(make_cache([9]), 16, split="held_out")) == 1
    with pytest.raises(UserError, match="held-out part of 'made' has nothing to predict"):
        PackedDataset(make_cache([1]), 16, split="held_out")
    with pytest.raises(UserError, match="nothing to predict"):
        PackedDataset(make_cache([9], loss=[False] * 9), 4)
    with pytest.raises(UserError, match="of no source"):
        PackedDataset([], 4)


def test_caches_of_different_tokenizers_do_not_mix(make_cache) -> None:
    other = make_cache([9])
    other.meta["tokenizer_fingerprint"] = "two"
    with pytest.raises(UserError, match="different tokenizers"):
        PackedDataset([make_cache([9]), other], 4)


def test_reading_touches_no_python_loop_per_token(make_cache) -> None:
    import time

    dataset = PackedDataset(make_cache([37] * 100_000), 1024)
    dataset.batch(0, 1)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        dataset.batch(0, 256)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.5  # 262,144 tokens: some ten milliseconds, seconds in a loop
