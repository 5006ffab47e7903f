"""What a model is worth: held-out loss and perplexity."""

from moeforge.evaluate.loss import EvalResult, held_out_loss
from moeforge.evaluate.streamed import streamed_loss
from moeforge.evaluate.text import sliding_windows, text_tokens, text_windows

__all__ = [
    "EvalResult",
    "held_out_loss",
    "sliding_windows",
    "streamed_loss",
    "text_tokens",
    "text_windows",
]
