"""A plan as data: which stage runs which units, and which rank holds which part of every layer."""

from moeforge.layout.build import build_layout
from moeforge.layout.layout import Coordinates, ExpertShard, Layout, Shard, Stage
from moeforge.layout.schedule import SCHEDULES, require_schedule
from moeforge.layout.serving import serving_layout
from moeforge.layout.shape import FFN_BLOCK, ExpertShape, ModelShape
from moeforge.layout.units import resolve_recompute, unit_names

__all__ = [
    "FFN_BLOCK",
    "SCHEDULES",
    "Coordinates",
    "ExpertShape",
    "ExpertShard",
    "Layout",
    "ModelShape",
    "Shard",
    "Stage",
    "build_layout",
    "require_schedule",
    "resolve_recompute",
    "serving_layout",
    "unit_names",
]
