"""From weights as they are to e4m3 with scales, one at a time; and scales for what multiplies them."""

from moeforge.quantize.calibrate import calibrate, observe
from moeforge.quantize.stream import QuantizeResult, quantize, require_unquantized
from moeforge.quantize.weight import quantize_weight

__all__ = ["QuantizeResult", "calibrate", "observe", "quantize", "quantize_weight", "require_unquantized"]
