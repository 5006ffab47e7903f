"""The processes that serve a model together: rank 0 leads in the process of the engine, the others follow."""

from moeforge.serve.ranks.rank import MakeRunner, Rank, RankRunner
from moeforge.serve.ranks.runner import TensorParallelRunner

__all__ = ["MakeRunner", "Rank", "RankRunner", "TensorParallelRunner"]
