"""Dense model to mixture of experts: the methods, the streaming conversion, and the check of its result."""

from moeforge.upcycle.config import UpcycleConfig
from moeforge.upcycle.similarity import expert_similarity
from moeforge.upcycle.stream import UpcycleResult, upcycle
from moeforge.upcycle.verify import Verification, sample_tokens, verify

__all__ = [
    "UpcycleConfig",
    "UpcycleResult",
    "Verification",
    "expert_similarity",
    "sample_tokens",
    "upcycle",
    "verify",
]
