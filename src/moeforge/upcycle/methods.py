"""How one expert is made from a dense feed-forward: pure functions of weights and a seed.

Legend: D hidden, F dense FFN width, E experts, G granularity (shards of one FFN copy).
A dense FFN is w1 (gate) [F, D], w3 (up) [F, D], w2 (down) [D, F]; intermediate unit j is row j of w1 and w3
and column j of w2. Every random draw comes from a CPU generator seeded by (seed, layer, expert), so a
result never depends on the order in which experts are made, nor on where an interrupted run went on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeforge.upcycle.config import UpcycleConfig


class FFN(NamedTuple):
    """w1 (gate) [F, D], w3 (up) [F, D], w2 (down) [D, F]."""

    w1: Tensor
    w3: Tensor
    w2: Tensor


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU generator for one purpose and index. The hash keeps neighbouring indices unrelated."""
    key = hashlib.sha256(repr((seed, purpose, *index)).encode()).digest()
    # The CPU generator is a Mersenne twister that reads the low 32 bits of its seed.
    return torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))


def noise(ffn: FFN, rng: torch.Generator, std: float, fraction: float = 1.0) -> FFN:
    """Adds N(0, (std * std(W))^2) to each matrix, on a random `fraction` of the F intermediate units.

    The same units in the three matrices. Small noise was found negligible, large noise harmful
    (Komatsuzaki et al. 2023, arXiv 2212.05055, appendix); `fraction` 0.5 is the noise baseline of
    Drop-Upcycling.
    """
    units = _choose(ffn.w1.shape[0], fraction, rng)

    def disturbed(weight: Tensor, dim: int) -> Tensor:
        part = _wide(weight.index_select(dim, units))
        amplitude = std * _deviation(weight)
        part += torch.randn(part.shape, generator=rng, dtype=part.dtype) * amplitude
        return weight.index_copy(dim, units, part.to(weight.dtype))

    return FFN(disturbed(ffn.w1, 0), disturbed(ffn.w3, 0), disturbed(ffn.w2, 1))


def drop(ffn: FFN, rng: torch.Generator, ratio: float = 0.5) -> FFN:
    """Drop-Upcycling (Nakamura et al. 2025): re-initialises a random `ratio` of the F intermediate units.

    Each matrix's chosen rows (w2: columns) are drawn anew from N(mu, sigma^2), mu and sigma being the mean
    and the standard deviation of the entries that are replaced. One index set serves the three matrices, as
    the paper's text says, so whole units are replaced; the authors' script draws an independent set per
    matrix.
    """
    units = _choose(ffn.w1.shape[0], ratio, rng)

    def redrawn(weight: Tensor, dim: int) -> Tensor:
        part = _wide(weight.index_select(dim, units))
        part.normal_(part.mean().item(), _deviation(part).item(), generator=rng)
        return weight.index_copy(dim, units, part.to(weight.dtype))

    return FFN(redrawn(ffn.w1, 0), redrawn(ffn.w3, 0), redrawn(ffn.w2, 1))


def shard(ffn: FFN, index: int, granularity: int) -> FFN:
    """Slice `index` of G equal slices of the intermediate units: w1, w3 [F/G, D], w2 [D, F/G]. G must
    divide F.

    The FFN is a sum over its units, so the G slices' outputs add up to the whole's.
    """
    width = ffn.w1.shape[0] // granularity
    begin = index * width
    return FFN(ffn.w1.narrow(0, begin, width), ffn.w3.narrow(0, begin, width), ffn.w2.narrow(1, begin, width))


def scale_down(ffn: FFN, factor: float) -> FFN:
    """Multiplies the output by `factor` exactly, through w2 alone."""
    return ffn if factor == 1 else ffn._replace(w2=_times(ffn.w2, factor))


def scale_cube_root(ffn: FFN, factor: float) -> FFN:
    """Multiplies each matrix by factor^(1/3), as published (He et al. 2024, arXiv 2410.07524).

    Exact only for an activation that is homogeneous (squared ReLU); silu(s x) is not s silu(x), so here it is
    an approximation.
    """
    root = factor ** (1 / 3)
    return ffn if factor == 1 else FFN(*(_times(weight, root) for weight in ffn))


def donor_of(expert: int, donors: int, config: UpcycleConfig) -> int:
    """Which dense donor an expert comes from: the copies are divided into contiguous blocks, one a donor."""
    return expert // config.shards * donors // config.copies


def make_expert(donors: Sequence[FFN], config: UpcycleConfig, layer: int, expert: int) -> FFN:
    """Expert `expert` of layer `layer`: w1, w3 [F/G, D], w2 [D, F/G], in the donors' dtype.

    Expert (copy c, shard g) has the index c * G + g. The order matters: equal router rows give a copy's
    shards equal logits, and ties break by expert index, so even when two copies tie the K chosen experts
    are whole copies.
    """
    ffn = donors[donor_of(expert, len(donors), config)]
    rng = generator(config.seed, "expert", layer, expert)
    if config.method == "noise":
        ffn = noise(ffn, rng, config.noise_std, config.noise_fraction)
    elif config.method == "drop":
        ffn = drop(ffn, rng, config.drop_ratio)
    elif config.method == "virtual-group":
        ffn = shard(ffn, expert % config.shards, config.shards)
    if config.scaling == "down":
        return scale_down(ffn, config.output_scale)
    return scale_cube_root(ffn, config.output_scale) if config.scaling == "cube-root" else ffn


def make_router(hidden: int, config: UpcycleConfig, layer: int, dtype: torch.dtype) -> Tensor:
    """Router rows [E, D] from N(0, router_std^2), one row a copy, repeated for that copy's G shards."""
    rng = generator(config.seed, "router", layer)
    rows = torch.randn(config.copies, hidden, generator=rng) * config.router_std
    return rows.to(dtype).repeat_interleave(config.shards, dim=0)


def _choose(units: int, share: float, rng: torch.Generator) -> Tensor:
    """Sorted indices of a random share of the units, at least one."""
    count = max(1, round(share * units))
    return torch.randperm(units, generator=rng)[:count].sort().values


def _wide(weight: Tensor) -> Tensor:
    """At least float32, so that statistics and draws do not depend on the stored type's few bits."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _deviation(weight: Tensor) -> Tensor:
    """Standard deviation (biased: one entry has 0, not NaN)."""
    return torch.std(_wide(weight), correction=0)


def _times(weight: Tensor, factor: float) -> Tensor:
    return (_wide(weight) * factor).to(weight.dtype)
