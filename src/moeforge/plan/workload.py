"""What a step asks of every rank, before it is decided which stage runs what."""

from __future__ import annotations

from dataclasses import dataclass

from moeforge.config.model import ModelConfig
from moeforge.layout import FFN_BLOCK


@dataclass(frozen=True)
class Workload:
    """A model, a step, and how the ranks of one pipeline stage share both.

    Sizes that do not divide are those of the rank that has most of them. `imbalance` is the largest over the mean
    number of assignments that a rank of an expert block receives (1 = perfectly balanced).
    """

    model: ModelConfig
    precision: str
    sequence_length: int
    micro_batch_sequences: int
    batch_sequences: int
    dp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    optimizer: str = "adamw"
    zero: bool = True
    dispatcher: str = "auto"
    overlap_chunks: int = 1
    group_sequences: int = 1
    imbalance: float = 1.0
    expert_precision: str = "same"

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one pipeline in one step."""
        return self.batch_sequences // (self.micro_batch_sequences * self.dp)

    @property
    def tokens(self) -> int:
        """T: tokens of a micro-batch."""
        return self.micro_batch_sequences * self.sequence_length

    @property
    def own_tokens(self) -> int:
        """t: a rank's share of them outside tensor-parallel regions (sequence parallelism)."""
        return -(-self.tokens // self.tp)

    @property
    def kv_groups(self) -> int:
        """KV groups of a layer on one rank."""
        return -(-self.model.num_kv_heads // self.tp)

    @property
    def ffn_columns(self) -> int:
        """Columns of a dense feed-forward on one rank."""
        return _blocks(self.model.ffn_size, self.tp)

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head on one rank."""
        return -(-self.model.vocab_size // self.tp)

    @property
    def experts(self) -> int:
        """Experts of a layer on one rank."""
        return -(-self.model.moe.num_experts // self.ep) if self.model.moe else 0

    @property
    def expert_columns(self) -> int:
        """Columns of each of them on one rank."""
        return _blocks(self.model.moe.expert_size, self.etp) if self.model.moe else 0

    @property
    def block(self) -> int:
        """b: ranks among which tokens travel to their experts."""
        return self.ep * self.etp

    @property
    def gathers_tokens(self) -> bool:
        """Whether every rank of a block gets all tokens, instead of each travelling to its experts: the rule of
        `parallel.dispatcher.make_dispatcher`."""
        if self.model.moe is None or self.block == 1 or self.dispatcher == "alltoall":
            return False
        small = self.model.moe.top_k * self.etp >= self.block and self.overlap_chunks == 1
        return self.dispatcher == "allgather" or small

    @property
    def expert_dp(self) -> int:
        """Copies of every expert."""
        return self.dp * self.tp // self.block

    @property
    def received_rows(self) -> float:
        """R: assignments that the busiest rank of a block computes in a layer.

        A block's tokens are those of its ranks; each of its ep parts gets 1 / ep of their K assignments on average.
        """
        if self.model.moe is None:
            return 0.0
        rows = self.own_tokens * self.block * self.model.moe.top_k / self.ep
        return rows * (self.imbalance if self.ep > 1 else 1.0)


def _blocks(columns: int, ranks: int) -> int:
    """Columns of the rank with most of them, which get whole blocks where there is a block for every rank."""
    if columns < FFN_BLOCK * ranks:
        return -(-columns // ranks)
    blocks = -(-columns // FFN_BLOCK)
    return min(columns, -(-blocks // ranks) * FFN_BLOCK)
