"""Training in one process: optimiser, balance control, loop, metrics, exact resume."""

from moeforge.train.balance import AdaptiveCoefficients, drop_rate
from moeforge.train.optimizer import Optimizer
from moeforge.train.run import prepare
from moeforge.train.schedule import learning_rate
from moeforge.train.trainer import Trainer, TrainResult

__all__ = [
    "AdaptiveCoefficients",
    "Optimizer",
    "TrainResult",
    "Trainer",
    "drop_rate",
    "learning_rate",
    "prepare",
]
