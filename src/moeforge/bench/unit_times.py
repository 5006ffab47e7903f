"""Seconds of each kind of unit on this device: what the planner's simulator runs on."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from moeforge.bench.clock import Clock, Mark
from moeforge.config.model import ModelConfig
from moeforge.layout import Layout, unit_names
from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups, Transformer
from moeforge.model.recompute import recomputed
from moeforge.model.rotary import rotary_angles
from moeforge.parallel import Mesh
from moeforge.parallel.dispatcher import make_dispatcher
from moeforge.parallel.parameters import parameter_parts
from moeforge.parallel.shard import TensorParallelShard
from moeforge.plan.memory import unit_kind
from moeforge.plan.times import UnitTime
from moeforge.train.optimizer import MODEL_DTYPE, Optimizer

Meet = Callable[[], None]
Way = Literal["plain", "recomputed", "split"]
_WARM_UPS = 2
_ENDS = ("embed", "head")
_TIMED = ("forward", "backward", "backward_input", "backward_weight", "recompute")


class _Run(NamedTuple):
    """A unit's forward pass that waits for its backward."""

    name: str
    unit: nn.Module
    x: Tensor
    y: Tensor


class _Marked(nn.Module):
    """A unit that notes when it runs: `marks` are begin and end of its first run, then of its second one."""

    def __init__(self, unit: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.unit, self.clock = unit, clock
        self.marks: list[Mark] = []

    def forward(self, *arguments: Any) -> Tensor:
        self.marks.append(self.clock.mark())
        y: Tensor = self.unit(*arguments)
        self.marks.append(self.clock.mark())
        return y


class UnitTimer:
    """The units of a model, with random weights, timed as a training step runs them.

    A short model runs whole micro-batches, unit after unit: so weights come from memory and not from a cache that the
    last repetition has filled, and every backward leaves its gradients where training sums them. Units of a kind are
    alike, so each kind need only be there once or twice. `meet` is called before every pass: processes that will
    compute at the same time should also be measured at the same time.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: str,
        sequences: int,
        positions: int,
        device: torch.device | None = None,
        meet: Meet = lambda: None,
    ) -> None:
        device = device or torch.device("cpu")
        self.config, self.meet, self.clock = config, meet, Clock(device)
        frequency = config.moe.layer_frequency if config.moe else 1
        self.short = short = replace(config, num_layers=min(config.num_layers, 2 * frequency))
        dtype, layout = MODEL_DTYPE[precision], Layout.single(short)
        mesh = Mesh.single(layout, device)
        torch.manual_seed(0)
        with device:
            self.model = Transformer(short).to(dtype)
            self.model.reset_parameters()
            self.tokens_T = torch.randint(0, short.vocab_size, (sequences * positions,))
            self.rotary = rotary_angles(short, torch.arange(positions).repeat(sequences), dtype)
        self.optimizer = Optimizer(
            dict(self.model.named_parameters()),
            parameter_parts(short, layout, 0, 0, 0),
            mesh,
            masters=precision == "bf16",
            clip_norm=1.0,
        )
        record, groups, top_k = None, None, 1
        if short.moe is not None:
            alpha = torch.full((len(short.moe_layers),), 0.01, dtype=torch.float64, device=device)
            record = RouterRecord(short.moe_layers, short.moe.num_experts, 1, alpha, sequences * positions)
            groups, top_k = RoutingGroups(sequences, sequences=sequences), short.moe.top_k
        self.context = ForwardContext(
            DenseAttention(sequences, positions),
            make_dispatcher(mesh, top_k),
            TensorParallelShard(mesh, sequences * positions),
            groups,
            record,
        )
        self.found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def samples(self, repeats: int) -> None:
        """Measure every unit `repeats` times, once the heap has grown to its size."""
        for repeat in range(_WARM_UPS + repeats):
            self.sample(warm_up=repeat < _WARM_UPS)

    def sample(self, warm_up: bool = False) -> None:
        """Measure every unit once more; a warm-up is not counted."""
        plain, split, again = self._pass("plain"), self._pass("split"), self._pass("recomputed")
        self.meet()
        begin = self.clock.mark()
        self.optimizer.step(1e-9)
        end = self.clock.mark()
        self.clock.wait()
        if warm_up:
            return
        elements = sum(parameter.numel() for parameter in self.model.parameters())
        self.found["all"]["update"].append(self.clock.seconds(begin, end) / elements)
        for name in plain:
            kind = self.found[unit_kind(self.short, name)]
            times = (*plain[name], *split[name][1:], again[name][2] if name in again else 0.0)
            for key, seconds in zip(_TIMED, times, strict=True):
                kind[key].append(seconds)

    def kinds(self) -> dict[str, UnitTime]:
        """Of every kind of unit of the model the times of a micro-batch, and of the whole unit's update.

        A tied matrix is updated, and counted, with the embedding.
        """
        update = typical(self.found["all"]["update"])
        result = {}
        for name in unit_names(self.short):
            kind = unit_kind(self.short, name)
            times = {key: typical(self.found[kind][key]) for key in _TIMED}
            result[kind] = UnitTime(**times, update=self.short.unit_parameters(name) * update)
        return result

    def units(self) -> list[UnitTime]:
        """The times of every unit of the model, in forward order."""
        kinds = self.kinds()
        return [kinds[unit_kind(self.config, name)] for name in unit_names(self.config)]

    def _pass(self, way: Way) -> dict[str, tuple[float, ...]]:
        """One micro-batch there and back.

        Of each unit the seconds of its forward and of its backward; "split": of its forward, of its backward for the
        input and of that for the weights; "recomputed", only of units that can be: of both, and what was added to them.
        """
        self.meet()
        marks: dict[str, list[tuple[Mark, Mark]]] = {}
        runs, x, marked = list[_Run](), self.tokens_T, dict[str, _Marked]()
        for name, unit in self.model.units():
            begin = self.clock.mark()
            if way == "recomputed" and name not in _ENDS:
                marked[name] = _Marked(unit, self.clock)
                y = recomputed(marked[name], x, self.rotary, self.context)
            else:
                y = unit(x, self.rotary, self.context)
            if name == "head":
                y = torch.stack([self.model.loss(y, self.tokens_T, self.context) / len(self.tokens_T)])
            marks[name] = [(begin, self.clock.mark())]
            runs.append(_Run(name, unit, x, y))
            x = y.detach().requires_grad_()
        grads: list[Tensor] | None = None
        left = dict[str, list[dict[str, Any]]]()
        for name, unit, x, y in reversed(runs):
            begin = self.clock.mark()
            if way == "split" and name == "embed":  # its tokens have no gradient: all is left for the weights
                marks[name].append((begin, begin))
            elif way == "split":
                left[name] = stage_backward_input([y], grads, [x], iter(self._weights(unit)))[1]
            if way != "split" or name == "embed":
                torch.autograd.backward([y], grads)
            marks[name].append((begin, self.clock.mark()))
            grads = [x.grad] if x.grad is not None else None
            x.grad = None
        for name, unit, _, _ in runs:
            if name in left:
                begin = self.clock.mark()
                stage_backward_weight(iter(self._weights(unit)), left[name])
                self.optimizer.collect()
                marks[name].append((begin, self.clock.mark()))
        self.clock.wait()
        seconds = {name: tuple(self.clock.seconds(*pair) for pair in pairs) for name, pairs in marks.items()}
        if way != "recomputed":
            return seconds
        return {name: (*seconds[name], self._added(seconds[name][0], unit)) for name, unit in marked.items()}

    def _added(self, forward: float, unit: _Marked) -> float:
        """The second run, and what the first took beyond the unit itself. Less noisy than a difference of passes, and
        on a quiet machine equal to it within a few percent."""
        first, second = (self.clock.seconds(*unit.marks[i : i + 2]) for i in (0, 2))
        return second + forward - first

    def _weights(self, unit: nn.Module) -> list[nn.Parameter]:
        own = list(unit.parameters())
        tied = unit is self.model.head and self.short.tie_embeddings and self.model.embed is not None
        return [*own, self.model.embed.weight] if tied and self.model.embed is not None else own


def unit_times(
    config: ModelConfig,
    precision: str,
    sequences: int,
    positions: int,
    repeats: int = 7,
    meet: Meet = lambda: None,
    device: torch.device | None = None,
) -> list[UnitTime]:
    """Seconds of every unit of `config` in forward order, for micro-batches of `sequences` x `positions` tokens."""
    timer = UnitTimer(config, precision, sequences, positions, device, meet)
    timer.samples(repeats)
    return timer.units()


def typical(values: Sequence[float]) -> float:
    """The mean of the middle half: a step is a sum over many units, of which a median would forget the slower ones."""
    ordered, cut = sorted(values), len(values) // 4
    return statistics.fmean(ordered[cut : len(values) - cut])


def mean_time(times: Sequence[UnitTime]) -> UnitTime:
    """The mean of several processes' times."""
    names = UnitTime.__dataclass_fields__
    return UnitTime(**{name: statistics.fmean(getattr(each, name) for each in times) for name in names})
