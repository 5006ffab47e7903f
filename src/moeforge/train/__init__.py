"""Training, in one process or as one rank of many: optimiser, balance control, loop, metrics, exact resume."""

from moeforge.train.balance import AdaptiveCoefficients, drop_rate
from moeforge.train.optimizer import Optimizer
from moeforge.train.result import TrainResult, read_result
from moeforge.train.resume import finished
from moeforge.train.run import prepare
from moeforge.train.schedule import learning_rate
from moeforge.train.trainer import Trainer

__all__ = [
    "AdaptiveCoefficients",
    "Optimizer",
    "TrainResult",
    "Trainer",
    "drop_rate",
    "finished",
    "learning_rate",
    "prepare",
    "read_result",
]
