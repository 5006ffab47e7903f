"""Text, JSON Lines, Parquet and their mixtures as packed memory-mapped tokens, read by global number."""

from moeforge.data.build import build_cache
from moeforge.data.cache import TokenCache, TokenStream
from moeforge.data.dataset import Batch, PackedDataset
from moeforge.data.python_corpus import python_corpus, python_source
from moeforge.data.source import Source

__all__ = [
    "Batch",
    "PackedDataset",
    "Source",
    "TokenCache",
    "TokenStream",
    "build_cache",
    "python_corpus",
    "python_source",
]
