"""Many ranks: mesh, the three seams, pipeline, ZeRO-1."""

from moeforge.parallel.group import Group, Pending
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.traffic import Traffic
from moeforge.parallel.watchdog import Watchdog

__all__ = ["Group", "Mesh", "Pending", "Traffic", "Watchdog"]
