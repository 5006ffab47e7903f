"""What is decided before a model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.layout import build_layout, serving_layout
from moeforge.parallel import Group, Traffic, Watchdog
from moeforge.serve.build import layout_of, length_limit, make_runner, open_model
from moeforge.serve.ranks import Rank

from .families import family

Saved = Callable[[str], Path]


def settings(**values: Any) -> EngineConfig:
    return EngineConfig(device="cpu", **values)


def test_a_model_is_opened_with_its_tokenizer_and_its_ends(saved: Saved) -> None:
    opened = open_model(settings(), str(saved("mixtral")))
    assert opened.config == open_checkpoint(saved("mixtral")).config
    assert opened.tokenizer.eos_token_id == 257 and opened.ends == {257}
    assert open_model(settings(skip_tokenizer_init=True), str(saved("mixtral"))).tokenizer is None


def test_the_tokenizers_end_is_one_too(saved: Saved) -> None:
    opened = open_model(settings(), str(saved("llama")))
    assert replace(opened, config=replace(opened.config, eos_token_ids=(3, 4))).ends == {3, 4, 257}


def test_what_is_no_model_is_refused(tmp_path: Path, saved: Saved) -> None:
    for load_format in ("auto", "dummy"):
        with pytest.raises(UserError, match="config.json|no such directory"):
            open_model(settings(load_format=load_format), str(tmp_path))
    shutil.copy(saved("llama") / "config.json", tmp_path)
    with pytest.raises(UserError, match="skip_tokenizer_init"):
        open_model(settings(load_format="dummy"), str(tmp_path))
    opened = open_model(settings(load_format="dummy", skip_tokenizer_init=True), str(tmp_path))
    assert opened.config == open_checkpoint(saved("llama")).config


def test_layouts_come_from_the_split_or_the_plan(tmp_path: Path) -> None:
    config = family("llama")
    assert layout_of(settings(), config) == serving_layout(config, 1)
    split = layout_of(settings(tensor_parallel_size=2, gpu_split=(2, 1)), config)
    assert split == serving_layout(config, 2, (2, 1)) != serving_layout(config, 2)
    split.write(tmp_path / "plan.json")
    assert layout_of(settings(plan=tmp_path / "plan.json"), config) == split
    assert layout_of(settings(plan=tmp_path / "plan.json", tensor_parallel_size=2), config) == split


def test_a_plan_that_does_not_go_with_the_rest_is_refused(tmp_path: Path) -> None:
    config, path = family("llama"), tmp_path / "plan.json"
    serving_layout(config, 3).write(path)
    for asked, model, message in (
        (settings(plan=path, tensor_parallel_size=2), config, "tensor_parallel_size = 2: the plan is for 3 ranks"),
        (settings(plan=path, gpu_split=(1,)), config, "gpu_split with plan"),
        (settings(plan=path), family("qwen3"), "made for another model"),
        (settings(plan=tmp_path / "absent"), config, "absent: cannot read the layout"),
    ):
        with pytest.raises(UserError, match=message):
            layout_of(asked, model)
    build_layout(config, tp=1, pp=2).write(path)
    with pytest.raises(UserError, match="2 stages.*`moeforge plan serve`"):
        layout_of(settings(plan=path), config)
    path.write_text("{}")
    with pytest.raises(UserError, match="plan.json: not a layout"):
        layout_of(settings(plan=path), config)


def test_the_length_is_the_models_unless_less_is_asked() -> None:
    assert length_limit(settings(), family("llama")) == 64
    assert length_limit(settings(max_model_len=1), family("llama")) == 1
    with pytest.raises(UserError, match="max_model_len = 65: must be between 1 and the model's 64"):
        length_limit(settings(max_model_len=65), family("llama"))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_a_rank_holds_what_fits_on_all(saved: Saved, dtype: str, expected: torch.dtype) -> None:
    asked = settings(dtype=dtype, max_model_len=32, max_num_seqs=2)
    layout = layout_of(asked, open_checkpoint(saved("llama")).config)
    group = Group("tp", (0,), 0, None, Traffic(1), Watchdog())
    for least, blocks in ((lambda n: n, 4), (lambda n: 3 if n == 4 else n, 3)):  # another rank has room for 3
        runner = make_runner(asked, str(saved("llama")), layout, Rank(0, 1, torch.device("cpu"), group, least))
        assert runner.num_blocks == blocks
        assert runner.cache.dtype == expected
        assert not any(parameter.requires_grad for parameter in runner.model.parameters())


def test_memory_on_cpu_is_looked_at_before_any_rank_loads(saved: Saved) -> None:
    """What the scarcest rank saw counts, as the others may have loaded since."""
    config = open_checkpoint(saved("llama")).config
    group = Group("tp", (0, 1), 0, None, Traffic(2), Watchdog())
    with pytest.raises(UserError, match="0.00 GB are free"):
        rank = Rank(0, 2, torch.device("cpu"), group, lambda _: 1000)
        make_runner(settings(), str(saved("llama")), serving_layout(config, 2), rank)
