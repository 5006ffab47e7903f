"""moeforge: dense checkpoints become trained mixture-of-experts models."""

__version__ = "0.1.0"
