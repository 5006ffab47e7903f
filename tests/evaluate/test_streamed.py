from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeforge.checkpoint import load_model, open_checkpoint, save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.data import Batch
from moeforge.errors import UserError
from moeforge.evaluate import held_out_loss, streamed, streamed_loss, text, text_windows
from moeforge.model import Transformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_the_whole_model(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=31, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24,
        max_positions=32, tie_embeddings=tied, moe=MoEConfig(4, 2, 24, gate_norm=1.0, layer_frequency=2),
    )  # fmt: skip
    model = Transformer(config)
    model.reset_parameters(0.3)
    source = open_checkpoint(save_model(model, tmp_path / "model"))
    tokens = torch.randint(31, (200,)).tolist()
    seen: list[tuple[int, int]] = []

    monkeypatch.setattr(text, "_BATCH_TOKENS", 16)

    def windows() -> list[Batch]:
        return list(text_windows(config, tokens, 16))

    found = streamed_loss(source, windows(), torch.float64, CPU, lambda done, units: seen.append((done, units)))
    expected = held_out_loss(load_model(source, torch.float64), windows())
    assert found.loss == pytest.approx(expected.loss, rel=1e-12) and found.tokens == expected.tokens == 199
    assert seen == [(i + 1, 8) for i in range(8)]
    seen.clear()
    monkeypatch.setattr(streamed, "_HIDDEN_BYTES", 40 * 16 * 8)  # of 40 tokens: windows of 16 go two by two
    again = streamed_loss(source, windows(), torch.float64, CPU, lambda done, units: seen.append((done, units)))
    assert again == found
    walks = -(-len(windows()) // 2)
    assert walks > 2 and seen == [(i + 1, 8 * walks) for i in range(8 * walks)]
    with pytest.raises(UserError, match="0 tokens to predict"):
        streamed_loss(source, [], torch.float64, CPU)
