"""Benchmarks: ours and the peers' in one run, on the same weights and data."""
