from pathlib import Path

import numpy as np
import pytest

from moeforge.data import Source, TokenCache, build_cache
from moeforge.errors import UserError


@pytest.fixture
def cache(tmp_path: Path, tokenizer) -> TokenCache:
    return build_cache([Source("memory", documents=["The dog", "A fox", "x"])], tokenizer, tmp_path)[0]


def test_reads_back_what_was_written(cache: TokenCache, tokenizer) -> None:
    again = TokenCache.open(cache.directory)
    assert isinstance(again.train.tokens, np.memmap)
    documents = np.split(again.train.tokens, again.train.starts[1:])
    assert [tokenizer.decode(ids) for ids in documents] == [
        text + "<|endoftext|>" for text in ("The dog", "A fox", "x")
    ]
    assert len(again.held_out) == 0
    assert (again.label, again.eos_id) == ("memory", tokenizer.eos_token_id)


@pytest.mark.parametrize("file", ["meta.json", "train/tokens.bin", "train/starts.bin"])
def test_a_missing_or_shortened_file_is_refused(cache: TokenCache, file: str) -> None:
    path = cache.directory / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="missing or damaged .*delete it"):
        TokenCache.open(cache.directory)
    path.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        TokenCache.open(cache.directory)


def test_loss_bits(make_cache) -> None:
    loss = np.random.default_rng(0).random(37) < 0.5
    stream = make_cache([37], loss=loss.tolist()).train
    index = np.array([[0, 8, 36], [7, 1, 15]])
    assert (stream.loss_at(index) == loss[index]).all()
