"""`moeforge plan`: place a model before anything runs."""

from __future__ import annotations

from moeforge.cli.plan_compare import compare
from moeforge.cli.plan_serve import serve
from moeforge.cli.plan_sweep import sweep
from moeforge.cli.plan_train import train

commands = {"train": train, "serve": serve, "compare": compare, "sweep": sweep}
