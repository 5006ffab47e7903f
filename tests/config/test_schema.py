"""The schema: defaults, checks over several keys, and what is refused."""

import math

import pytest
from pydantic import ValidationError

from moeforge.config.keys import keys, tables
from moeforge.config.schema import TrainConfig

MINIMAL = {"model": {"path": "m"}, "data": {"train": ({"path": "a.txt"},)}}


def build(**sections) -> TrainConfig:
    return TrainConfig.model_validate(MINIMAL | sections)


def test_defaults_are_the_paper_s_where_it_has_one():
    config = build()
    router = config.router
    assert (router.alpha_max, router.xi, router.beta, router.aux_loss) == (0.01, 0.2, 0.99, "skywork")
    assert router.capacity_factor == 1.25 and not router.drop_tokens and router.group_sequences == 1
    assert config.data.train[0].weight == 1.0 and config.data.eval == ()
    assert config.optimizer.betas == (0.9, 0.95)


def test_frozen():
    with pytest.raises(ValidationError):
        build().train.steps = 5


def test_every_key_is_described_in_one_line():
    assert len(keys()) > 50
    for key in keys().values():
        assert key.meaning.endswith(".") and "\n" not in key.meaning
        assert key.allowed and "None" not in key.allowed
    assert all(table.meaning.endswith(".") for table in tables())


@pytest.mark.parametrize("field", ["lr", "eps", "weight_decay", "clip_norm", "expert_lr_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", True])
def test_numbers_are_finite_in_range_and_not_quoted(field, value):
    with pytest.raises(ValidationError):
        build(optimizer={field: value})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"batch_sequences": 6, "micro_batch_sequences": 4}},
            "train.micro_batch_sequences = 4: must divide train.batch_sequences (6)",
        ),
        (
            {"router": {"group_sequences": 3}, "train": {"micro_batch_sequences": 4}},
            "train.micro_batch_sequences = 4: must be a multiple of router.group_sequences (3)",
        ),
        (
            {"train": {"steps": 100}},
            "schedule.warmup_steps = 100: must be below train.steps (100)",
        ),
        (
            {"schedule": {"kind": "wsd", "decay_fraction": 0.95}},
            "schedule.decay_fraction = 0.95: warm-up (100 steps) and decay must fit into train.steps (1000)",
        ),
        (
            {"router": {"scope": "global", "drop_tokens": True}},
            'scope = "global": must be group when router.drop_tokens = true, because tokens are',
        ),
        (
            {"data": {"train": ({"path": "a", "format": "text", "messages_field": "m"},)}},
            'messages_field = "m": must be absent with format = "text"',
        ),
        (
            {"data": {"train": ({"path": "a"},), "eval": ({"path": "b"}, {"path": "c", "weight": 2.0})}},
            "eval.1.weight = 2.0: must be 1: only data.train has weights",
        ),
    ],
)
def test_checks_over_several_keys(sections, message):
    with pytest.raises(ValidationError) as caught:
        build(**sections)
    assert message in caught.value.errors()[0]["msg"]


def test_what_the_checks_let_through():
    build(router={"scope": "global"})
    build(router={"drop_tokens": True, "group_sequences": 2})
    build(train={"steps": 1}, schedule={"warmup_steps": 0, "kind": "wsd", "decay_fraction": 1.0})
    build(model={"path": "m", "recompute": ("layers.0.ffn",)})
