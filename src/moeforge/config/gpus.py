"""The GPUs of a server, one profile a rank: "8x4090", "4x4090+4x3090", or the hardware file of one node."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from itertools import groupby

from moeforge.config.clusters import DEVICES, load_hardware
from moeforge.config.hardware import HardwareProfile, Link
from moeforge.config.section import expanded
from moeforge.errors import UserError

MOST_GPUS = 256
_TERM = re.compile(r"(\d{1,6})\s*x\s*(\S.*)")


def load_gpus(text: str) -> tuple[HardwareProfile, ...]:
    """Profiles in the order of the ranks, from a sum of COUNTxNAME or from a TOML file (`moeforge bench calibrate`).

    Raises UserError: an unknown name, with the nearest one; no GPU, or more than 256; a file of several nodes.
    """
    path = expanded(text)
    if path.suffix == ".toml" or path.is_file():
        profile = load_hardware(text)
        if profile.nodes > 1:
            raise UserError(f"{path}: nodes = {profile.nodes}: must be 1; the ranks of a server share one node")
        found = [(profile.devices_per_node, profile)]
    else:
        found = [_term(text, term.strip().lower()) for term in text.split("+")]
    count = sum(number for number, _ in found)
    if not 1 <= count <= MOST_GPUS:
        raise UserError(f'gpus = "{text}": must be 1 to {MOST_GPUS} GPUs, not {count}')
    return tuple(profile for number, profile in found for _ in range(number))


def _term(text: str, term: str) -> tuple[int, HardwareProfile]:
    match = _TERM.fullmatch(term)
    name = match[2] if match else term
    if match and name in DEVICES:
        if not int(match[1]):
            raise UserError(f'gpus = "{text}": must have at least one GPU in "{term}"')
        return int(match[1]), DEVICES[name]
    nearest = difflib.get_close_matches(name, DEVICES, 1, cutoff=0)[0]
    raise UserError(
        f'gpus = "{text}": "{term}" is unknown; did you mean {match[1] if match else 1}x{nearest}? It must be a sum of '
        f"COUNTxNAME, as 4x4090+4x3090, with NAME one of {', '.join(DEVICES)}, or a TOML file as moeforge bench "
        "calibrate writes it"
    )


def describe_gpus(gpus: Sequence[HardwareProfile]) -> str:
    """What `load_gpus` reads, where the names are those of presets: "4x4090+4x3090"."""
    return "+".join(f"{len(list(same))}x{name}" for name, same in groupby(gpus, lambda gpu: gpu.name))


def shared_link(gpus: Sequence[HardwareProfile]) -> Link:
    """What a collective over these GPUs sees: the narrowest of their links, and the latest."""
    links = [gpu.intra_node for gpu in gpus]
    return Link(
        gbytes_per_second=min(link.gbytes_per_second for link in links),
        latency_us=max(link.latency_us for link in links),
    )


def parse_gpu_split(text: str, count: int) -> tuple[float, ...]:
    """A weight, or the memory, of each of `count` GPUs, as "24,24,12"; only their proportions count.

    Raises UserError for what is no list of so many finite numbers, at least 0 each and not all 0.
    """
    try:
        parts = tuple(float(part) for part in text.split(","))
    except ValueError:
        parts = ()
    if len(parts) != count or not all(math.isfinite(part) and part >= 0 for part in parts) or not any(parts):
        raise UserError(
            f'gpu_split = "{text}": must have one number for each of the {count} GPUs, separated by commas, at least 0 '
            "each and not all 0"
        )
    return parts
