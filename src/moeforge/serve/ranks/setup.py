"""What a worker process is told when it starts, as one line of JSON."""

from __future__ import annotations

import dataclasses
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from moeforge.config.serving import EngineConfig
from moeforge.layout import Layout
from moeforge.serve.ranks.rank import MakeRunner


@dataclass(frozen=True)
class Setup:
    """`make_runner` is named as "module:function"; `store` is the file where ranks meet; `threads` are for the CPU."""

    index: int
    config: EngineConfig
    model: str
    layout: Layout
    make_runner: str
    store: Path
    threads: int

    def to_json(self) -> str:
        """Text without a line break that `from_json` reads back."""
        plan = None if self.config.plan is None else str(self.config.plan)
        return json.dumps(
            {
                "index": self.index,
                "config": dataclasses.asdict(self.config) | {"plan": plan},
                "model": self.model,
                "layout": self.layout.to_json(),
                "make_runner": self.make_runner,
                "store": str(self.store),
                "threads": self.threads,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """The inverse of `to_json`."""
        data = json.loads(text)
        config = data["config"]
        config["gpu_split"] = None if config["gpu_split"] is None else tuple(config["gpu_split"])
        config["plan"] = None if config["plan"] is None else Path(config["plan"])
        data |= {"config": EngineConfig(**config), "layout": Layout.from_json(data["layout"])}
        return cls(**(data | {"store": Path(data["store"])}))

    def factory(self) -> MakeRunner:
        """The function that `make_runner` names."""
        module, _, name = self.make_runner.partition(":")
        made: MakeRunner = getattr(importlib.import_module(module), name)
        return made


def name_of(make_runner: MakeRunner) -> str:
    """The name under which another process finds a function."""
    return f"{make_runner.__module__}:{make_runner.__qualname__}"
