"""The law of layout invariance (DESIGN section 3): real training steps of many ranks against one process.

Every row of LAYOUTS runs `prepare` and `train_step` in as many processes as it needs, and must give the loss, gradient
norm, gradients, updated weights, drop rates, coefficients and router statistics of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.config.parallel import layout_for
from moeforge.config.schema import TrainConfig
from moeforge.layout import Layout, Stage
from moeforge.model import Transformer
from moeforge.parallel.gather import full_weights
from moeforge.train import prepare

Make = Callable[..., TrainConfig]
Source = Callable[..., Path]
STEPS = 3
LR = 0.5

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"moe": None, "num_layers": 3, "tie_embeddings": True},
    "moe": {"num_layers": 3, "tie_embeddings": True},
    "untied": {"num_layers": 3, "num_heads": 6, "num_kv_heads": 3, "tie_embeddings": False, "qkv_bias": True},
    "sixteen": {"num_layers": 2, "moe": {"num_experts": 16, "top_k": 2, "router_bias": True}, "num_kv_heads": 1},
    "mixed": {
        "num_layers": 4, "moe": {"num_experts": 5, "layer_frequency": 2, "gate_norm_learned": True},
        "num_heads": 5, "num_kv_heads": 5, "qk_norm": "head", "output_bias": True, "ffn_size": 80,
    },
    "full": {"num_layers": 2, "qk_norm": "full", "tie_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`world` processes train `model` under [parallel] `parallel`; `sections` hold for both sides."""

    world: int
    parallel: dict[str, Any]
    model: str = "moe"
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    micro: int = 1
    stages: tuple[tuple[int, int], ...] = ()  # explicit unit ranges, as a plan has them
    quick: bool = False


DROP = {"router": {"drop_tokens": True, "capacity_factor": 1.0}}
ACCUMULATE = {"train": {"batch_sequences": 8}}
ADAM = {"optimizer": {"kind": "adamw", "lr": 1e-3, "clip_norm": 0.05}}

LAYOUTS: dict[str, Case] = {
    # Data parallel, with and without ZeRO.
    "dp2": Case(2, {"dp": 2}, quick=True),
    "dp2 without zero": Case(2, {"dp": 2, "zero": False}),
    "dp3 of 6 sequences": Case(3, {"dp": 3}, sections={"train": {"batch_sequences": 6}}),
    "dp2 adam clipped": Case(2, {"dp": 2}, sections=ADAM, quick=True),
    "dp4 accumulating": Case(4, {"dp": 4}, sections=ACCUMULATE),
    "dp2 dense": Case(2, {"dp": 2}, "dense"),
    # Tensor parallel: EDP.
    "tp2 edp": Case(2, {"tp": 2}, quick=True),
    "tp2 dense": Case(2, {"tp": 2}, "dense"),
    "tp3 edp 6,5,5 experts, zero groups": Case(3, {"tp": 3}, "sixteen", DROP, quick=True),
    "tp4 edp uneven vocabulary": Case(4, {"tp": 4}, "untied"),
    "tp2 weights 3:1": Case(2, {"tp": 2, "tp_weights": [3.0, 1.0]}, "mixed"),
    "tp2 mixed layers, head norms, biases": Case(2, {"tp": 2}, "mixed", quick=True),
    "tp3 mixed layers": Case(3, {"tp": 3}, "mixed", DROP),
    "tp2 full norms": Case(2, {"tp": 2}, "full", quick=True),
    "tp3 full norms": Case(3, {"tp": 3}, "full"),
    "tp2 all-gather dispatch": Case(2, {"tp": 2, "dispatcher": "allgather"}),
    "tp2 overlap": Case(2, {"tp": 2, "overlap_chunks": 3}, sections=DROP),
    "tp2 recompute": Case(2, {"tp": 2}, sections={"model": {"recompute": "all"}}, quick=True),
    "tp3 recompute attention, zero groups": Case(3, {"tp": 3}, "sixteen", {"model": {"recompute": "attention"}}),
    "tp3 recompute ffn, overlap": Case(3, {"tp": 3, "overlap_chunks": 2}, sections={"model": {"recompute": "ffn"}}),
    # Tensor and data parallel: EDP, EP, ETP and mixtures.
    "tp2 dp2 edp": Case(4, {"tp": 2, "dp": 2}, sections=DROP | ADAM),
    "tp2 dp2 ep": Case(4, {"tp": 2, "dp": 2, "expert_mode": "ep"}, quick=True),
    "tp2 dp2 etp": Case(4, {"tp": 2, "dp": 2, "expert_mode": "etp"}, sections=DROP, quick=True),
    "dp3 ep": Case(
        3, {"dp": 3, "expert_mode": "ep"}, "sixteen", {"train": {"batch_sequences": 3}}
    ),
    "dp2 ep with overlap": Case(2, {"dp": 2, "expert_mode": "ep", "overlap_chunks": 2}, sections=ADAM),
    "tp4 ep2 etp2": Case(4, {"tp": 4, "expert_mode": "custom", "ep": 2, "etp": 2}, "untied"),
    "tp2 dp2 ep2 etp1": Case(4, {"tp": 2, "dp": 2, "expert_mode": "custom", "ep": 2, "etp": 1}),
    "tp2 dp2 ep1 etp2": Case(4, {"tp": 2, "dp": 2, "expert_mode": "custom", "ep": 1, "etp": 2}),
    "dp2 ep1 etp1": Case(2, {"dp": 2, "expert_mode": "custom", "ep": 1, "etp": 1}, sections=ADAM),
    "tp2 dp2 ep2 etp2, all-gather": Case(
        4, {"tp": 2, "dp": 2, "expert_mode": "custom", "ep": 2, "etp": 2, "dispatcher": "allgather"}
    ),
    "tp3 etp uneven columns": Case(3, {"tp": 3, "expert_mode": "etp"}, "mixed"),
    # Pipelines.
    "pp2 1f1b": Case(2, {"pp": 2}, quick=True),
    "pp2 uneven, inside a layer": Case(2, {"pp": 2, "stages": [1.5, 1.5]}, sections=DROP, quick=True),
    "pp3 untied uneven": Case(3, {"pp": 3, "stages": [2, 0.5, 0.5]}, "untied"),
    "pp4 an empty stage": Case(4, {"pp": 4, "stages": [1, 0, 1, 1]}),
    "pp3 embedding and head alone": Case(3, {"pp": 3}, stages=((0, 1), (1, 7), (7, 8))),
    "pp3 first and last empty": Case(3, {"pp": 3}, stages=((0, 0), (0, 8), (8, 8))),
    "pp2 interleaved": Case(2, {"pp": 2, "chunks": 2, "schedule": "interleaved-1f1b", "stages": [1, 0.5, 0.5, 1]}),
    "pp2 zero-bubble": Case(2, {"pp": 2, "schedule": "zero-bubble"}, sections=DROP, quick=True),
    "pp2 zbv tied on one rank": Case(2, {"pp": 2, "schedule": "zbv", "chunks": 2, "stages": [0.5, 1, 1, 0.5]}),
    "pp2 zbv recompute by stage": Case(
        2,
        {"pp": 2, "schedule": "zbv", "chunks": 2, "stages": [1, 1, 0.5, 0.5], "recompute_layers": [1, 0, 0, 0]},
        quick=True,
    ),
    "pp2 recompute by stage": Case(2, {"pp": 2, "recompute_layers": [2, 0]}, sections=ADAM),
    "pp2 dp2 ep": Case(4, {"pp": 2, "dp": 2, "expert_mode": "ep"}, sections=ACCUMULATE | DROP),
    "pp2 tp2 edp": Case(4, {"pp": 2, "tp": 2}, sections=ADAM, quick=True),
    "pp2 tp2 zero-bubble": Case(4, {"pp": 2, "tp": 2, "schedule": "zero-bubble"}, "full"),
    "pp2 tp3 zbv": Case(
        6, {"pp": 2, "tp": 3, "schedule": "zbv", "chunks": 2, "stages": [0.5, 0.5, 0.5, 0.5]}, "sixteen"
    ),
    "pp3 dp2 zero-bubble ep": Case(
        6, {"pp": 3, "dp": 2, "schedule": "zero-bubble", "expert_mode": "ep"}, sections=ACCUMULATE
    ),
    "pp2 tp2 zero-bubble, recompute": Case(
        4, {"pp": 2, "tp": 2, "schedule": "zero-bubble", "recompute_layers": [1, 1]}
    ),
    "pp2 dp2 tp2 edp": Case(8, {"pp": 2, "dp": 2, "tp": 2}, sections=ACCUMULATE | ADAM),
    "pp2 dp2 tp2 etp interleaved": Case(
        8,
        {"pp": 2, "dp": 2, "tp": 2, "expert_mode": "etp", "schedule": "interleaved-1f1b", "chunks": 2,
         "stages": [0.5, 1, 1, 0.5]},
        sections=ACCUMULATE,
    ),
    # Balance losses that look across sequences and ranks.
    "dp2 global load": Case(2, {"dp": 2}, sections={"router": {"aux_loss": "global", "scope": "global"}}, quick=True),
    "tp2 dp2 sequence loss": Case(4, {"tp": 2, "dp": 2}, sections={"router": {"aux_loss": "sequence"}}),
    "pp2 switch loss": Case(2, {"pp": 2}, sections={"router": {"aux_loss": "switch"}}),
}  # fmt: skip

Result = tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def sections_of(case: Case, precision: str) -> dict[str, dict[str, Any]]:
    """What both sides train with."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"precision": precision},
        "optimizer": {"kind": "sgd", "lr": LR, "clip_norm": 0.0},
        "router": {"alpha_max": 0.5, "beta": 0.5, "xi": 2.0},
        "train": {"steps": 10, "batch_sequences": 4},
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "run": {"similarity_every": 2},
        "data": {"sequence_length": 15},
    }
    for name, values in case.sections.items():
        sections.setdefault(name, {}).update(values)
    return sections


def steps_of(config: TrainConfig, plan: Path | None = None) -> Result:
    """Rows of metrics; on the first rank whole gradients of the first step and whole weights after the last."""
    trainer = prepare(config, plan=plan)

    def whole(local: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What ranks hold of every parameter, put together on the first one."""
        collect = full_weights(trainer.mesh, trainer.model_config, local, trainer.dtype)
        with torch.device("meta"):
            names = list(Transformer(trainer.model_config).state_dict())
        return {name: collect(name).clone() for name in names}

    reduced: list[dict[str, torch.Tensor]] = []
    zero = trainer.optimizer.zero
    reduce = zero.reduce

    def noted(*arguments: Any) -> dict[str, torch.Tensor]:
        found = reduce(*arguments)
        reduced.append({name: owned.clone() for name, owned in found.items()})  # clipping is in place
        return found

    zero.reduce = noted  # type: ignore[method-assign]
    rows = [trainer.train_step() for _ in range(STEPS)]
    rows[-1]["eval_loss"] = trainer.evaluate()
    gradients = {name: torch.zeros_like(weight) for name, weight in trainer.optimizer.weights.items()}
    zero.gather(reduced[0], gradients)
    weights = {name: weight.detach() for name, weight in trainer.optimizer.weights.items()}
    return rows, whole(gradients), whole(weights)


@pytest.fixture(scope="session")
def references() -> dict[Any, Result]:
    """What one process gave, by model and sections."""
    return {}


def compare(rows: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    for row, wanted in zip(rows, expected, strict=True):
        for key in ("step", "tokens", "lr"):
            assert row[key] == wanted[key]
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in wanted:
                assert row[key] == pytest.approx(wanted[key], rel=tolerance), key
        for layer, other in zip(row["moe"], wanted["moe"], strict=True):
            assert layer.keys() == other.keys()
            # Counts of whole assignments: routing is the same, or it is not.
            for key in ("layer", "drop_rate", "aux_coef", "load", "load_max_over_mean"):
                assert layer[key] == other[key], (key, layer[key], other[key])
            for key in ("aux_loss", "gate_entropy", "max1_over_max2", "max2_over_max3", "expert_similarity"):
                if key in other:
                    assert layer[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


def check(case: Case, precision: str, source: Source, make_config: Make, references: Any, run_ranks: Any) -> None:
    tolerance = 1e-9 if precision == "fp64" else 1e-5
    model = source(**MODELS[case.model])
    sections = sections_of(case, precision)
    sections["train"]["micro_batch_sequences"] = case.micro
    many = make_config(model, "many", **sections, parallel=case.parallel)
    layout = None
    if case.stages:
        layout = many_layout(many, case)
    # The global micro-batch is the same: that of one process has the sequences of all data-parallel ranks.
    dp = case.world // (case.parallel.get("pp", 1) * case.parallel.get("tp", 1))
    sections["train"]["micro_batch_sequences"] = case.micro * dp
    sections["model"]["recompute"] = "none"
    key = repr((case.model, sections))
    if key not in references:
        references[key] = steps_of(make_config(model, "one", **sections))
    expected_rows, expected_gradients, expected_weights = references[key]

    results: list[Result] = run_ranks(case.world, lambda rank: steps_of(many, layout))
    for rows, _, _ in results:
        compare(rows, expected_rows, tolerance)
    _, gradients, weights = results[0]
    assert gradients.keys() == expected_gradients.keys() and weights.keys() == expected_weights.keys()
    for name, wanted in expected_gradients.items():
        error = (gradients[name] - wanted).norm() / wanted.norm()
        assert error < tolerance, f"gradient of {name}: {error:.1e}"
    if precision == "fp64":  # in float32 three steps from weights that differ by rounding say nothing more
        for name, wanted in expected_weights.items():
            torch.testing.assert_close(
                weights[name], wanted, rtol=1e-9, atol=1e-11, msg=lambda m, at=name: f"weights {at}: {m}"
            )


def many_layout(config: TrainConfig, case: Case) -> Path:
    """The plan of explicit stages, as a file."""
    shape = open_checkpoint(config.model.path).config
    layout = replace(layout_for(config, shape, case.world), stages=tuple(Stage(*span) for span in case.stages))
    path = Path(config.run.dir).parent / "plan.json"
    layout.write(path)
    assert Layout.read(path) == layout
    return path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if case.quick else pytest.mark.slow) for name, case in LAYOUTS.items()]
)
def test_every_layout_gives_what_one_process_gives(
    name: str, source: Source, make_config: Make, references: Any, run_ranks: Any
) -> None:
    check(LAYOUTS[name], "fp64", source, make_config, references, run_ranks)


FLOAT32 = (
    "dp2",
    "tp2 edp",
    "tp3 edp 6,5,5 experts, zero groups",
    "tp2 dp2 etp",
    "tp2 mixed layers, head norms, biases",
    "pp2 zero-bubble",
    "pp2 zbv recompute by stage",
    "pp2 dp2 ep",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i < 3 else pytest.mark.slow) for i, name in enumerate(FLOAT32)]
)
def test_float32(name: str, source: Source, make_config: Make, references: Any, run_ranks: Any) -> None:
    check(LAYOUTS[name], "fp32", source, make_config, references, run_ranks)


def test_the_table_is_long_enough() -> None:
    assert len(LAYOUTS) >= 40
