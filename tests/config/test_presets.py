"""Presets have the published number of parameters, and load without pydantic."""

import subprocess
import sys

import pytest

from moeforge.config.model import ModelConfig
from moeforge.config.presets import HUB_IDS, PRESETS, model_preset
from moeforge.errors import UserError

# Published totals: Skywork-MoE from its announcement (146.36 B), the others as counted by their model pages.
EXACT = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
}
BILLIONS = {"skywork-13b": (13.85, 13.85), "skywork-moe": (146.36, 22.69), "mixtral-8x7b": (46.70, 12.88)}


@pytest.mark.parametrize(("name", "total"), EXACT.items())
def test_exact_totals(name, total):
    assert model_preset(name).parameters() == total


@pytest.mark.parametrize(("name", "billions"), BILLIONS.items())
def test_total_and_active_billions(name, billions):
    config = model_preset(name)
    assert tuple(round(config.parameters(active) / 1e9, 2) for active in (False, True)) == billions


def test_every_preset_is_counted_and_survives_its_dictionary():
    assert set(PRESETS) == set(EXACT) | set(BILLIONS) == set(HUB_IDS)
    for config in PRESETS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_skywork_moe_normalises_its_gate_and_differs_from_its_source_by_the_experts():
    moe, dense = model_preset("skywork-moe"), model_preset("skywork-13b")
    assert moe.moe is not None and moe.moe.gate_norm == 1.0 and len(moe.moe_layers) == 52
    assert (moe.num_heads, moe.head_dim, moe.ffn_size) == (dense.num_heads, dense.head_dim, dense.ffn_size)


def test_an_unknown_name_says_the_nearest_and_all():
    with pytest.raises(UserError, match='"SkyWork_MoE": unknown; did you mean skywork-moe.*mixtral-8x7b'):
        model_preset("SkyWork_MoE")


def test_presets_and_layouts_import_without_pydantic():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pydantic', 'torch', 'transformers']));"
        "import moeforge.config.presets, moeforge.layout, moeforge.plan.memory"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
