from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moeforge.kernels.triton import configs
from moeforge.kernels.triton.configs import Config, bucket, config, default_config

CPU = torch.device("cpu")


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "_table", configs._table.__wrapped__)  # read anew at every call
    return tmp_path


def test_a_bucket_holds_an_even_share() -> None:
    assert [bucket(rows, 8) for rows in (0, 1, 128, 129, 512, 10_000)] == [16, 16, 16, 32, 64, 128]
    assert bucket(5, 0) == 16


def test_measured_configurations_come_before_defaults(cache_home: Path) -> None:
    assert config("w8a8", 32, CPU) == default_config("w8a8", 32)
    path = configs.table_path("cpu")
    assert path == cache_home / "moeforge" / "kernels" / "cpu.json"
    path.parent.mkdir(parents=True)
    measured = Config(32, 256, 8, 5, 4)
    path.write_text(json.dumps({"w8a8": {32: measured._asdict()}}))
    assert config("w8a8", 32, CPU) == measured
    assert config("w8a8", 16, CPU) == default_config("w8a8", 16)
    assert config("16-bit", 32, CPU) == default_config("16-bit", 32)


@pytest.mark.parametrize("text", ["{", "[]", '{"w8a8": {"16": {"block": 1}}}', '{"w8a8": {"few": {}}}'])
def test_a_spoilt_table_is_named_and_ignored(text: str, cache_home: Path) -> None:
    path = configs.table_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=rf"{path}: ignored: no table of kernel configurations .*delete it"):
        assert config("w8a8", 16, CPU) == default_config("w8a8", 16)


def test_a_table_that_cannot_be_read_is_none(cache_home: Path) -> None:
    configs.table_path("cpu").mkdir(parents=True)
    assert config("w8a8", 16, CPU) == default_config("w8a8", 16)


def test_without_a_home_directory_there_is_no_table(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert config("w8a8", 16, CPU) == default_config("w8a8", 16)


def test_files_are_named_after_devices() -> None:
    assert configs.table_path("NVIDIA GeForce RTX 4090").name == "nvidia-geforce-rtx-4090.json"
