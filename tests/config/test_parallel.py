"""The [parallel] section, and the layouts it asks for."""

import pytest
from pydantic import ValidationError

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.parallel import check_batch, layout_for
from moeforge.config.schema import TrainConfig
from moeforge.errors import UserError
from moeforge.layout import Layout, build_layout

MINIMAL = {"model": {"path": "m"}, "data": {"train": ({"path": "a.txt"},)}}
DENSE = ModelConfig(vocab_size=101, hidden_size=24, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=4, ffn_size=200)
SPARSE = ModelConfig(
    vocab_size=101, hidden_size=24, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=4, ffn_size=200,
    moe=MoEConfig(num_experts=6, top_k=2, expert_size=64),
)  # fmt: skip


def configured(train: dict | None = None, model: dict | None = None, **parallel) -> TrainConfig:
    sections = {"train": {"batch_sequences": 24, "micro_batch_sequences": 1} | (train or {}), "parallel": parallel}
    return TrainConfig.model_validate(MINIMAL | sections | {"model": {"path": "m"} | (model or {})})


@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_one_process_and_the_default_table_hold_everything(model):
    config = TrainConfig.model_validate(MINIMAL)
    assert layout_for(config, model, 1) == Layout.single(model)
    assert layout_for(configured(model={"recompute": "all"}), model, 1) == Layout.single(model, "all")


def test_dp_is_what_remains():
    assert layout_for(configured(), SPARSE, 4).dp == 4
    layout = layout_for(configured(pp=2, tp=3), SPARSE, 12)
    assert (layout.pp, layout.dp, layout.tp, layout.world_size) == (2, 2, 3, 12)
    assert layout == layout_for(configured(pp=2, dp=2, tp=3), SPARSE, 12)


@pytest.mark.parametrize(
    ("table", "sizes"),
    [
        ({"expert_mode": "edp"}, (3, 1, 2)),
        ({"expert_mode": "ep"}, (6, 1, 1)),
        ({"expert_mode": "etp"}, (2, 3, 1)),
        ({"expert_mode": "custom", "ep": 3, "etp": 2}, (3, 2, 1)),
        ({"expert_mode": "custom", "ep": 1, "etp": 3}, (1, 3, 2)),
    ],
)
def test_expert_modes_on_two_replicas_of_three_ranks(table, sizes):
    layout = layout_for(configured(tp=3, **table), SPARSE, 6)
    assert (layout.ep, layout.etp, layout.expert_dp) == sizes
    layout.check(SPARSE, 6)
    dense = layout_for(configured(tp=3, **table), DENSE, 6)
    assert (dense.ep, dense.etp, dense.expert_dp) == (1, 1, 6)
    dense.check(DENSE, 6)


def test_the_whole_table_reaches_the_layout():
    stages, weights = (1.5, 1.0, 2.0, 1.5), (2.0, 1.0)
    table = {"pp": 2, "tp": 2, "chunks": 2, "schedule": "zbv", "stages": stages, "tp_weights": weights}
    layout = layout_for(configured(**table, recompute_layers=(2, 0, 1, 0)), SPARSE, 4)
    sizes = {"pp": 2, "tp": 2, "chunks": 2, "schedule": "zbv", "stages": stages, "weights": weights}
    assert layout == build_layout(SPARSE, **sizes, recompute_layers=(2, 0, 1, 0))
    assert [len(stage.recompute) for stage in layout.stages] == [3, 0, 1, 0]  # the third begins inside a layer


@pytest.mark.parametrize(
    ("table", "world_size", "line"),
    [
        ({"tp": 3}, 4, "parallel.pp = 1, parallel.tp = 3: pp x tp must divide the number of processes (4)"),
        ({"tp": 2}, 1, "parallel.pp = 1, parallel.tp = 2: pp x tp must divide the number of processes (1)"),
        (
            {"pp": 2, "dp": 2},
            8,
            "parallel.pp = 2, parallel.dp = 2, parallel.tp = 1: pp x dp x tp must be the number of processes (8)",
        ),
        ({"dp": 3}, 2, "parallel.pp = 1, parallel.dp = 3, parallel.tp = 1: pp x dp x tp must be the number of proc"),
        (
            {"dp": 5},
            5,
            "train.batch_sequences = 24: must be a multiple of train.micro_batch_sequences x dp = 1 x 5 = 5",
        ),
        (
            {"tp": 8},
            8,
            'parallel.expert_mode = "edp": spreads experts over tp = 8 ranks, must be at most the model\'s number of '
            "experts (6)",
        ),
        (
            {"tp": 4, "expert_mode": "ep"},
            8,
            'parallel.expert_mode = "ep": spreads experts over dp x tp = 8 ranks, must be at most',
        ),
        ({"expert_mode": "etp"}, 8, 'parallel.expert_mode = "etp": spreads experts over dp = 8 ranks, must be at'),
        (
            {"expert_mode": "custom", "ep": 2, "etp": 3},
            8,
            "parallel.ep x etp = 2 x 3: must divide dp x tp = 8 x 1",
        ),
        ({"pp": 8}, 8, "parallel.pp x chunks = 8: must be at most the model's 6 layers"),
        ({"pp": 2, "stages": (3.0, 2.0)}, 2, "parallel.stages = [3, 2]: must sum to the model's 6 layers, not 5"),
        ({"pp": 2, "chunks": 2}, 2, 'parallel.schedule = "1f1b": takes 1 stages a rank, but there are 4 stages on 2'),
        ({"pp": 2, "schedule": "zbv"}, 2, 'parallel.schedule = "zbv": takes 2 stages a rank, but there are 2'),
        ({"recompute_layers": (7,)}, 1, "parallel.recompute_layers.0 = 7: must be 0 to 6, the stage's number of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_naming_the_key(table, world_size, line):
    with pytest.raises(UserError) as caught:
        layout_for(configured(**table), SPARSE, world_size)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_too_few_micro_batches_for_the_pipeline():
    line = r'parallel.schedule = "1f1b": needs at least as many micro-batches as stages \(4\), but a step has 3'
    with pytest.raises(UserError, match=line):
        layout_for(configured(pp=4, train={"batch_sequences": 6}), SPARSE, 8)
    layout = layout_for(configured(pp=4, train={"batch_sequences": 8}), SPARSE, 8)
    with pytest.raises(UserError, match=line):  # a plan, read from a file
        check_batch(configured(train={"batch_sequences": 6}), layout)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"ep": 2}, 'ep = 2: must be absent with expert_mode = "edp", which decides it'),
        ({"expert_mode": "ep", "etp": 2}, 'etp = 2: must be absent with expert_mode = "ep", which decides it'),
        ({"expert_mode": "custom", "ep": 2}, 'etp = 0: must be at least 1 with expert_mode = "custom"'),
        ({"tp": 2, "tp_weights": (1.0,)}, "tp_weights = [1.0]: must have one number for each of the 2 tp ranks"),
        ({"tp": 2, "tp_weights": (0.0, 0.0)}, "tp_weights = [0.0, 0.0]: must not all be 0"),
        ({"dispatcher": "allgather", "overlap_chunks": 2}, 'overlap_chunks = 2: must be 1 with dispatcher = "allg'),
    ],
)
def test_keys_that_contradict_each_other(table, line):
    with pytest.raises(ValidationError) as caught:
        configured(**table)
    assert caught.value.errors()[0]["msg"].startswith(line)


def test_one_way_to_choose_recomputation():
    with pytest.raises(ValidationError) as caught:
        configured(recompute_layers=(1,), model={"recompute": "ffn"})
    line = 'parallel.recompute_layers = [1]: must be empty unless model.recompute = "none"'
    assert caught.value.errors()[0]["msg"] == line
