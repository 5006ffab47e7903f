"""The GPUs of a server: sums of counts, hardware files, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from moeforge.config.clusters import DEVICES, load_hardware
from moeforge.config.gpus import describe_gpus, load_gpus, parse_gpu_split, shared_link
from moeforge.errors import UserError


@pytest.mark.parametrize("text", ["8x4090", "7x4090", "4x4090+4x3090", "1xh200", "8xa800", "2xh100+1xcpu+2xh100"])
def test_sums_of_counts_give_a_profile_for_each_rank(text: str) -> None:
    gpus = load_gpus(text)
    assert describe_gpus(gpus) == text
    assert len(gpus) == sum(int(term.split("x")[0]) for term in text.split("+"))
    assert all(gpu == DEVICES[gpu.name] for gpu in gpus)


def test_spaces_and_case_do_not_matter() -> None:
    assert load_gpus(" 4 x 4090 + 2xH200 ") == load_gpus("4x4090+2xh200")


def test_the_slowest_link_is_what_a_collective_sees() -> None:
    link = shared_link(load_gpus("1xh200+1x4090"))
    assert link == DEVICES["4090"].intra_node


def test_a_file_of_one_node(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    profile = load_hardware("1x3-h100").model_copy(update={"name": "mine"})
    path.write_text(tomli_w.dumps(profile.model_dump(mode="json", exclude_none=True)))
    assert load_gpus(str(path)) == (profile,) * 3
    path.write_text(tomli_w.dumps(profile.model_copy(update={"nodes": 2}).model_dump(mode="json", exclude_none=True)))
    with pytest.raises(UserError, match="nodes = 2: must be 1; the ranks of a server share one node"):
        load_gpus(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8x490", '"8x490" is unknown; did you mean 8x4090?'),
        ("4x4090+4xH20", '"4xh20" is unknown; did you mean 4xh200?'),
        ("h200", '"h200" is unknown; did you mean 1xh200?'),
        ("4x4090+", '"" is unknown; did you mean 1x'),
        ("", '"" is unknown'),
        ("-1x4090", '"-1x4090" is unknown'),
        ("1.5x4090", '"1.5x4090" is unknown'),
        ("99999999999x4090", '"99999999999x4090" is unknown'),
        ("0x4090", 'must have at least one GPU in "0x4090"'),
        ("4x4090+0x3090", 'must have at least one GPU in "0x3090"'),
        ("300x4090", "must be 1 to 256 GPUs, not 300"),
        ("200x4090+100x3090", "must be 1 to 256 GPUs, not 300"),
        ("nowhere.toml", "nowhere.toml: cannot read the hardware profile"),
    ],
)
def test_what_is_no_gpu(text: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        load_gpus(text)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_a_split_has_a_number_for_each_gpu() -> None:
    assert parse_gpu_split("24, 24,12.5", 3) == (24.0, 24.0, 12.5)
    assert parse_gpu_split("1,0", 2) == (1.0, 0.0)


NO_SPLITS = ["24,24", "24,24,12,12", "24,x,12", "", "24,,12", "-1,2,3", "nan,1,1", "inf,1,1", "0,0,0"]


@pytest.mark.parametrize("text", NO_SPLITS)
def test_what_is_no_split(text: str) -> None:
    with pytest.raises(UserError) as found:
        parse_gpu_split(text, 3)
    assert str(found.value).startswith(f'gpu_split = "{text}": must have one number for each of the 3 GPUs')
