"""The mesh: every process group of a run, in one place.

Groups are made by the public `torch.distributed.new_group`, by their members alone, so a rank's start does not depend
on the size of the world; torch's DeviceMesh would need private calls for groups that cut across its dimensions.

Such a group's members find each other by its name, which torch makes from their ranks and the number of groups that the
rank has already. So every rank must make equally many of them, or later groups never meet.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from moeforge.layout import Layout
from moeforge.parallel.group import Group
from moeforge.parallel.traffic import Traffic
from moeforge.parallel.watchdog import Watchdog


class Mesh:
    """Where this rank stands (`at`) and the groups it is in.

    `world`: all ranks. `pp`: the stages of one pipeline. `dp`: ranks with equal weights and other sequences. `tp`:
    ranks that share each layer of the attention. `dp_tp`: all ranks of a stage. `block`: the ep x etp ranks among which
    tokens travel to their experts. `expert_dp`: ranks that hold the same part of the same experts. `tied`: the two
    stages that hold copies of a tied embedding (this rank alone where it holds none).
    """

    def __init__(
        self, layout: Layout, rank: int, device: torch.device, make: Callable[[str, tuple[int, ...]], Group]
    ) -> None:
        self.layout, self.rank, self.device = layout, rank, device
        self.at = layout.coordinates(rank)
        self.stages = layout.stages_of(self.at.pp)
        everyone = [(other, layout.coordinates(other)) for other in range(layout.world_size)]
        at = self.at

        def group(name: str, *same: str) -> Group:
            """The ranks whose coordinates `same` equal this one's."""
            members = tuple(r for r, other in everyone if all(getattr(other, key) == getattr(at, key) for key in same))
            return make(name, members)

        self.world = make("world", tuple(range(layout.world_size)))
        self.pp = group("pp", "dp", "tp")
        self.dp = group("dp", "pp", "tp")
        self.tp = group("tp", "pp", "dp")
        self.dp_tp = group("dp_tp", "pp")
        self.block = group("block", "pp", "expert_dp")
        self.expert_dp = group("expert_dp", "pp", "expert_rank")
        ends = tied_ranks(layout)
        self.tied = make("tied", tuple(self.pp.ranks[r] for r in ends) if at.pp in ends else (rank,))
        self.traffic, self.watchdog = self.world.traffic, self.world.watchdog

    @classmethod
    def single(cls, layout: Layout, device: torch.device) -> Mesh:
        """One process, no torch.distributed."""
        traffic, watchdog = Traffic(1), Watchdog()
        return cls(layout, 0, device, lambda name, ranks: Group(name, ranks, 0, None, traffic, watchdog))

    @classmethod
    def create(
        cls,
        layout: Layout,
        device: torch.device,
        timeout_seconds: float = 600.0,
        local_world_size: int | None = None,
        watchdog: Watchdog | None = None,
    ) -> Mesh:
        """Of initialised processes; all ranks call it with the same layout. Groups of the same ranks share one process
        group, except that of `pp`: its transfers between neighbours may overtake collectives."""
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if layout.world_size != processes:
            raise ValueError(f"a layout of {layout.world_size} ranks cannot run on {processes}")
        if layout.world_size == 1:
            return cls.single(layout, device)
        rank = dist.get_rank()
        traffic, made = Traffic(local_world_size or layout.world_size), dict[tuple[int, ...], dist.ProcessGroup]()
        watchdog = watchdog or Watchdog()
        assert dist.group.WORLD is not None
        made[tuple(range(layout.world_size))] = dist.group.WORLD
        timeout = timedelta(seconds=2 * timeout_seconds + 60)  # later than the watchdog

        def make(name: str, ranks: tuple[int, ...]) -> Group:
            process_group: dist.ProcessGroup | None = None
            if len(ranks) > 1:
                process_group = None if name == "pp" else made.get(ranks)
                if process_group is None:
                    process_group = dist.new_group(list(ranks), timeout, use_local_synchronization=True)
                    if name != "pp":
                        made[ranks] = process_group
            elif name == "tied" and len(tied_ranks(layout)) > 1:
                # The others of this pipeline make one here: see the top of this file.
                dist.new_group(list(ranks), timeout, use_local_synchronization=True)
            return Group(name, ranks, rank, process_group, traffic, watchdog)

        return cls(layout, rank, device, make)


def tied_ranks(layout: Layout) -> tuple[int, ...]:
    """The pipeline ranks that hold a tied embedding: one if embedding and head live on the same rank."""
    last = layout.stages[-1].end_unit - 1
    ends = {layout.pp_rank_of(layout.stage_of_unit(unit)) for unit in (0, last)}
    return tuple(sorted(ends))
