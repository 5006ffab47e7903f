"""Bytes of a matrix on a rank: its values, and the scales of one in FP8 as `model.fp8.Fp8Matrix` holds them."""

from __future__ import annotations

from moeforge.config.quantization import QuantizationConfig
from moeforge.partition import Range

GROUP_ROWS, BLOCK, SCALE_BYTES = 16, 128, 4
"""Rows that share a scale in memory, columns that do (from the global first one on), and a scale's bytes: those of
`kernels.fp8_weight`, which needs torch."""


def matrix_bytes(rows: int, columns: Range, fp8: QuantizationConfig | None, element: int, aligned: bool = True) -> int:
    """`rows` of a matrix and, of its columns, a range. `element`: bytes of a value that is not FP8.

    `aligned`: rows with different scales meet at multiples of GROUP_ROWS; otherwise every row has its own.
    """
    begin, end = columns
    values = rows * (end - begin)
    if fp8 is None:
        return values * element
    blocks = -(-end // BLOCK) - begin // BLOCK if fp8.scales == "block128" else 1
    groups = rows if fp8.scales == "channel" or not aligned else -(-rows // GROUP_ROWS)
    return values + groups * blocks * SCALE_BYTES
