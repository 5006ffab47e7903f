"""What a model is worth: held-out loss and perplexity."""

from moeforge.evaluate.loss import EvalResult, held_out_loss
from moeforge.evaluate.text import evaluate_text, sliding_windows

__all__ = ["EvalResult", "evaluate_text", "held_out_loss", "sliding_windows"]
