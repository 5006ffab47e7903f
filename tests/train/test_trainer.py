from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import load_model
from moeforge.cli.app import main
from moeforge.config.schema import TrainConfig
from moeforge.config.toml import dump_config
from moeforge.errors import RunError, UserError
from moeforge.train import Trainer, prepare
from moeforge.train.metrics import read_rows
from moeforge.train.state import checkpoints

Make = Callable[..., TrainConfig]
Source = Callable[..., Path]
RunMain = Callable[..., tuple[int, dict[str, Any], str]]
PARALLEL_KEYS = ("loss", "lr", "grad_norm", "eval_loss", "moe", "tokens")


def rows_of(run: str | Path) -> list[dict[str, Any]]:
    rows = read_rows(Path(run) / "metrics.jsonl")
    return [{key: row[key] for key in PARALLEL_KEYS if key in row} for row in rows]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.chunks[0].named_parameters()}


def test_training_lowers_held_out_loss_and_writes_what_it_says(source: Source, make_config: Make) -> None:
    config = make_config(source(), train={"steps": 30}, run={"gate_distribution_every": 10})
    trainer = prepare(config)
    result = trainer.run()
    assert result.eval_loss is not None and result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before - 0.3
    rows = read_rows(Path(config.run.dir) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(31))
    assert rows[-1]["tokens"] == 30 * 4 * 16
    layer = rows[10]["moe"][1]
    assert layer["layer"] == 1 and sum(layer["load"]) == pytest.approx(1)
    assert 0 <= layer["drop_rate"] <= 1 and 0 < layer["gate_entropy"] <= math.log(4)
    assert "expert_similarity" in rows[3]["moe"][0] and "expert_similarity" not in rows[4]["moe"][0]
    distribution = rows[10]["gate_distribution"][0]
    assert sum(distribution["sorted_mean"]) == pytest.approx(1, abs=1e-5)
    assert distribution["sorted_mean"] == sorted(distribution["sorted_mean"], reverse=True)
    final = load_model(trainer.save_final())
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), trainer.chunks[0].parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure", "fp32"])
def test_resume_gives_the_same_losses_bit_for_bit(source: Source, make_config: Make, precision: str) -> None:
    model = source()
    whole = make_config(model, "whole", model={"precision": precision})
    cut = make_config(model, "cut", model={"precision": precision})
    straight = prepare(whole)
    straight.run()
    part = prepare(cut)
    for _ in range(3):
        part.train_step()
    part.save()
    part.saver.wait()
    for _ in range(2):  # lost by the kill
        part.train_step()
    del part  # and with it the lock on its directory
    resumed = prepare(cut)
    assert resumed.step == 3
    resumed.run()
    assert rows_of(whole.run.dir)[4:] == rows_of(cut.run.dir)[-5:]
    ours, theirs = weights_of(straight), weights_of(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("recompute", ["all", ["layers.1.ffn"]])
def test_recomputation_changes_nothing(source: Source, make_config: Make, recompute: Any) -> None:
    model = source()
    plain, again = make_config(model, "plain"), make_config(model, "again", model={"recompute": recompute})
    for config in (plain, again):
        prepare(config).run()
    assert rows_of(plain.run.dir) == rows_of(again.run.dir)


@pytest.mark.parametrize("aux_loss", ["skywork", "switch", "sequence"])
def test_micro_batches_do_not_matter(source: Source, make_config: Make, aux_loss: str) -> None:
    """One process, several accumulations: the same step (law of layout invariance, float64, SGD)."""
    model, results = source(), []
    for micro in (1, 2, 4):
        config = make_config(
            model, f"micro{micro}", model={"precision": "fp64"}, optimizer={"kind": "sgd", "lr": 0.5},
            router={"aux_loss": aux_loss, "alpha_max": 0.5}, train={"micro_batch_sequences": micro},
        )  # fmt: skip
        trainer = prepare(config)
        rows = [trainer.train_step() for _ in range(3)]
        results.append((rows, weights_of(trainer)))
    for rows, weights in results[1:]:
        for row, expected in zip(rows, results[0][0], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-9)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-9)
            for layer, wanted in zip(row["moe"], expected["moe"], strict=True):
                assert layer["drop_rate"] == wanted["drop_rate"] and layer["load"] == wanted["load"]
                assert layer["aux_loss"] == pytest.approx(wanted["aux_loss"], rel=1e-9)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][1][name], rtol=1e-9, atol=1e-12)


def test_a_skewed_router_is_brought_back_only_with_the_auxiliary_loss(source: Source, make_config: Make) -> None:
    """alpha rises while tokens overflow and falls when the load is even; at alpha = 0 the skew stays."""
    model = source(moe={"num_experts": 4, "top_k": 2, "gate_norm": None})
    history = {}
    for alpha_max in (2.0, 0.0):
        config = make_config(
            model, f"alpha{alpha_max}", run={"similarity_every": 0}, train={"steps": 150},
            router={"alpha_max": alpha_max, "xi": 8.0, "beta": 0.9}, optimizer={"lr": 3e-3, "weight_decay": 0.0},
            checkpoint={"every": 0}, eval={"every": 0}, schedule={"kind": "constant"},
        )  # fmt: skip
        trainer = prepare(config)
        with torch.no_grad():
            for name, parameter in trainer.chunks[0].named_parameters():
                if name.endswith("ffn.norm.weight"):
                    parameter[0] = 3.0  # a direction that all tokens share ...
                if name.endswith("router.weight"):
                    parameter.mul_(0.1)
                if name == "embed.weight":
                    parameter[:, 0] = 1.0
            for layer in range(2):
                router = trainer.chunks[0].get_parameter(f"layers.{layer}.ffn.router.weight")
                router[0, 0] += 1.0  # ... and that two experts answer to
                router[1, 0] += 0.7
        trainer.balance.alpha.zero_()  # so that a rise can be seen
        rows = [trainer.train_step() for _ in range(config.train.steps)]
        history[alpha_max] = [
            {key: max(layer[key] for layer in row["moe"]) for key in ("drop_rate", "aux_coef")} for row in rows
        ]
    adaptive, off = history[2.0], history[0.0]
    assert adaptive[0]["drop_rate"] > 0.3
    peak = max(range(len(adaptive)), key=lambda i: adaptive[i]["aux_coef"])
    assert adaptive[peak]["aux_coef"] > 0.5
    late = sum(row["drop_rate"] for row in adaptive[-20:]) / 20
    assert late < 0.12
    assert adaptive[-1]["aux_coef"] < adaptive[peak]["aux_coef"] * 0.75
    assert sum(row["drop_rate"] for row in off[-20:]) / 20 > 0.25


def start(config: TrainConfig, directory: Path) -> subprocess.Popen[bytes]:
    """`moeforge train` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "moeforge", "train", str(written(config, directory)), "--json"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def written(config: TrainConfig, directory: Path) -> Path:
    file = directory / "config.toml"
    file.write_text(dump_config(config))
    return file


def wait_for_rows(run: Path, count: int, ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while len(read_rows(run / "metrics.jsonl")) < count:
        assert not ended() and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def run_main(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> RunMain:
    """`run_main(config, options...)`: exit code, JSON and stderr of `moeforge train`, in this process."""

    def run(config: TrainConfig, *options: str) -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        code = main(["train", str(written(config, tmp_path)), "--json", *options])
        out, err = capfd.readouterr()
        return code, json.loads(out) if out else {}, err

    return run


def test_killed_at_random_moments_the_run_gives_the_same_metrics(
    source: Source, make_config: Make, run_main: RunMain
) -> None:
    model, long = source(), {"train": {"steps": 120}, "checkpoint": {"every": 7}, "eval": {"every": 25}}
    straight, killed = make_config(model, "straight", **long), make_config(model, "killed", **long)
    prepare(straight).run()
    generator = random.Random(1)
    for moment in (20, 50, 80):
        process = multiprocessing.get_context("fork").Process(target=lambda: prepare(killed).run())
        process.start()
        wait_for_rows(Path(killed.run.dir), moment + generator.randrange(10), lambda at=process: not at.is_alive())
        time.sleep(generator.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    code, result, err = run_main(killed)
    assert (code, result["run_dir"]) == (0, killed.run.dir), err
    assert rows_of(killed.run.dir) == rows_of(straight.run.dir)
    assert len(checkpoints(Path(killed.run.dir))) == 2
    assert not list((Path(killed.run.dir) / "checkpoints").glob(".*"))


def test_sigterm_saves_and_exits(source: Source, make_config: Make, tmp_path: Path) -> None:
    config = make_config(source(), train={"steps": 5000}, checkpoint={"every": 0})
    process = start(config, tmp_path)
    wait_for_rows(Path(config.run.dir), 5, lambda: process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    result = json.loads(out)
    assert result["interrupted"] == "SIGTERM" and result["final"] is None
    assert prepare(config).step == result["steps"] == len(read_rows(Path(config.run.dir) / "metrics.jsonl")) - 1


def test_resuming_with_another_configuration_is_refused(source: Source, make_config: Make) -> None:
    model = source()
    trainer = prepare(make_config(model))
    trainer.train_step()
    trainer.save()
    trainer.saver.wait()
    del trainer
    with pytest.raises(UserError, match=r"optimizer\.lr = 0\.02.*was trained with 0\.01"):
        prepare(make_config(model, optimizer={"lr": 2e-2}))
    with pytest.raises(UserError, match="holds a run already"):
        prepare(make_config(model), resume="never")
    with pytest.raises(UserError, match="not a training checkpoint"):
        prepare(make_config(model), resume=str(model))
    assert prepare(make_config(model, checkpoint={"every": 1})).step == 1


def test_bad_input_is_one_line(source: Source, make_config: Make) -> None:
    model = source()
    with pytest.raises(UserError, match=r"data\.sequence_length = 65.*64 positions"):
        prepare(make_config(model, data={"sequence_length": 65}))
    with pytest.raises(UserError, match=r"model\.device = 'tpu'"):
        prepare(make_config(model, model={"device": "tpu"}))


def test_a_full_disk_keeps_the_last_checkpoint(
    source: Source, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeforge.train import dcp

    config = make_config(source(), checkpoint={"every": 1, "keep": 2})
    trainer = prepare(config)
    trainer.train_step()
    first = trainer.save()
    trainer.saver.wait()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "write", full)
    trainer.train_step()
    trainer.save()
    with pytest.raises(RunError, match=f"disk is full.*{first.name}"):
        trainer.saver.wait()
    assert checkpoints(Path(config.run.dir)) == [first]
    assert not list(first.parent.glob(".*"))
    del trainer
    assert prepare(config).step == 1


def test_diverging_stops_with_a_reason(source: Source, make_config: Make) -> None:
    config = make_config(source(), optimizer={"lr": 1e30, "clip_norm": 0.0, "kind": "sgd"}, train={"steps": 20})
    with pytest.raises(RunError, match="diverged; lower optimizer.lr"):
        prepare(config).run()


def test_dense_models_train_too(source: Source, make_config: Make) -> None:
    config = make_config(source(moe=None))
    result = prepare(config).run()
    assert result.steps == 8 and all(row.get("moe", []) == [] for row in rows_of(config.run.dir))


def test_tokens_dropped_beyond_capacity_change_the_loss(source: Source, make_config: Make) -> None:
    model = source()
    losses = []
    for drop in (False, True):
        config = make_config(model, f"drop{drop}", router={"drop_tokens": drop, "capacity_factor": 0.5})
        row = prepare(config).train_step()
        losses.append(row["loss"])
        assert row["moe"][0]["drop_rate"] > 0.3
    assert losses[0] != losses[1]


@pytest.mark.parametrize("every", [0, 3])
def test_a_finished_run_started_again_is_reported_and_left_alone(
    source: Source, make_config: Make, run_main: RunMain, every: int
) -> None:
    model = source()
    config = make_config(model, checkpoint={"every": every})
    code, first, err = run_main(config)
    assert code == 0, err
    run = Path(config.run.dir)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, second, err = run_main(config)
    assert (code, second) == (0, first), err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    code, _, err = run_main(make_config(model, checkpoint={"every": every}, optimizer={"lr": 0.5}))
    assert code == 2 and "optimizer.lr = 0.5" in err and len(err.splitlines()) == 1
    code, _, err = run_main(config, "--resume", "never")
    assert code == 2 and "holds a finished run" in err


def test_killed_between_the_last_checkpoint_and_the_result(
    source: Source, make_config: Make, run_main: RunMain
) -> None:
    config = make_config(source())
    trainer = prepare(config)
    expected = trainer.run()
    del trainer  # before save_final
    code, result, err = run_main(config)
    assert code == 0, err
    assert result["final_loss"] == expected.final_loss and result["eval_loss"] == expected.eval_loss
    assert (Path(config.run.dir) / "final" / "config.json").is_file()


def test_two_processes_do_not_share_a_run(source: Source, make_config: Make, tmp_path: Path) -> None:
    config = make_config(source())
    trainer = prepare(config)
    process = start(config, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and b"another process is training in it" in err
    assert trainer.run().steps == 8


def test_a_world_without_torchrun_is_refused(
    source: Source, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start the processes with torchrun"):
        prepare(make_config(source()))


def test_resuming_from_an_older_checkpoint_does_not_lose_the_later(source: Source, make_config: Make) -> None:
    model = source()
    config = make_config(model, train={"steps": 8}, checkpoint={"every": 3, "keep": 5})
    prepare(config).run()
    first, *later = checkpoints(Path(config.run.dir))
    with pytest.raises(UserError, match=f"holds the later {later[-1].name}"):
        prepare(config, resume=str(first))
    branch = make_config(model, "branch", checkpoint={"every": 3, "keep": 5})
    assert prepare(branch, resume=str(first)).step == 3
    assert checkpoints(Path(config.run.dir)) == [first, *later]


def test_another_corpus_under_the_same_name_is_noticed(
    source: Source, make_config: Make, corpus: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    config = make_config(source(), data={"train": [{"path": str(mine), "format": "text"}]})
    trainer = prepare(config)
    trainer.train_step()
    trainer.save()
    trainer.saver.wait()
    del trainer
    file = mine / "000.txt"
    text = file.read_text()
    file.write_text(text)  # touched, not changed
    assert prepare(config).step == 1
    file.write_text("w1 w2 w3 " + text)
    with pytest.raises(UserError, match="no longer the text"):
        prepare(config)


def test_alpha_starts_at_its_maximum_and_falls_in_balance(source: Source, make_config: Make) -> None:
    config = make_config(source(), router={"alpha_max": 0.05, "beta": 0.5, "capacity_factor": 4.0})
    trainer = prepare(config)
    alphas = [trainer.train_step()["moe"][0]["aux_coef"] for _ in range(4)]
    assert alphas == pytest.approx([0.05, 0.025, 0.0125, 0.00625])


def test_a_signal_before_the_first_step_leaves_nothing_to_resume(
    source: Source, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(source())
    evaluate = Trainer.evaluate

    def interrupted(self: Trainer) -> float:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", interrupted)
        result = prepare(config).run()
    assert (result.steps, result.interrupted) == (0, "SIGTERM") and checkpoints(Path(config.run.dir)) == []
    assert prepare(config).run().steps == 8


def test_a_signal_in_the_last_step_comes_too_late(source: Source, make_config: Make) -> None:
    config = make_config(source())
    trainer = prepare(config)
    result = trainer.run(lambda row: signal.raise_signal(signal.SIGTERM) if row["step"] == 8 else None)
    assert result.steps == 8 and result.interrupted is None


def test_a_second_signal_much_later_acts_as_outside(
    source: Source, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeforge.train.signals._ONE_INTENT_SECONDS", -1.0)
    trainer = prepare(make_config(source()))

    def twice(row: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer.run(twice)


def test_a_refused_run_leaves_no_directory(source: Source, make_config: Make, tmp_path: Path) -> None:
    config = make_config(source(), run={"dir": str(tmp_path / "deep" / "run")}, data={"sequence_length": 65})
    with pytest.raises(UserError, match="64 positions"):
        prepare(config)
    assert not (tmp_path / "deep").exists()


def test_a_refused_run_takes_nothing_with_it(
    source: Source, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside the run's directory by then, a token cache say, is not the refusal's to remove."""
    cache = tmp_path / "runs" / "cache"
    config = make_config(source(), run={"dir": str(tmp_path / "runs" / "one")}, data={"cache_dir": str(cache)})

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("no model")

    monkeypatch.setattr("moeforge.train.run.load_part", fail)
    with pytest.raises(UserError, match="no model"):
        prepare(config)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["cache"] and any(cache.glob("*/meta.json"))


def test_a_result_without_metrics_is_still_written(source: Source, make_config: Make, run_main: RunMain) -> None:
    config = make_config(source())
    trainer = prepare(config)
    trainer.run()
    del trainer
    (Path(config.run.dir) / "metrics.jsonl").unlink()
    code, result, err = run_main(config)
    assert code == 0, err
    assert result["steps"] == 8 and result["final"] is not None
