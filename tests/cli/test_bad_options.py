"""Bad options, corpora, training files, checkpoints and runs through the command line; test_bad_input.py has models."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from moeforge.cli.app import main

WEIGHTS = "model.safetensors"
Refused = Callable[..., str]
Command = Callable[..., list[str]]
Model = Callable[..., Path]


@pytest.mark.parametrize(
    "options, line",
    [
        ("--top-k 5", "moe.top_k = 5: must be between 1 and the number of experts (4)"),
        ("--top-k 0", "moe.top_k = 0: must be between 1"),
        ("--top-k 1", "moe.top_k = 1 with moe.renormalize = true"),
        ("--experts 2 --gate-norm 1", "gate normalisation needs at least 3 experts"),
        ("--experts 0", "num_experts = 0"),
        ("--experts -3", "num_experts = -3"),
        ("--experts many", "many"),
        ("--gate-norm 0", "gate_norm = 0.0: must be a positive number, or off"),
        ("--gate-norm nan", "must be a positive number"),
        ("--layer-frequency 0", "layer_frequency = 0"),
        ("--layer-frequency 9", "layer_frequency = 9"),
        ("--method noise --noise-std nan", "noise_std = nan"),
        ("--method drop --drop-ratio 1.5", "drop_ratio = 1.5"),
        ("--seed -1", "seed = -1"),
        ("--donor nowhere", "model = 'nowhere'"),
    ],
)  # fmt: skip
def test_upcycle_options(options: str, line: str, model: Model, command: Command, refused: Refused) -> None:
    assert line in refused([*command("upcycle", model()), *options.split()])


def test_upcycle_of_a_mixture(model: Model, command: Command, refused: Refused) -> None:
    assert "dense" in refused(command("upcycle", model("moe")))


def test_upcycle_over_something(tmp_path: Path, model: Model, command: Command, refused: Refused) -> None:
    path, out = model(), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    assert f"{out}: already exists and is not empty" in refused(command("upcycle", path))
    shutil.rmtree(out)
    out.write_text("a file")
    assert f"{out}: already exists" in refused(command("upcycle", path))
    assert "already exists" in refused(["upcycle", str(path), str(path)])
    assert "not a directory" in refused(["upcycle", str(path), str(out / "below")]).lower()


@pytest.mark.parametrize(
    "options, line",
    [
        ("--max-tokens -1", "max_tokens = -1"),
        ("--max-tokens 0", "max_tokens = 0"),
        ("--max-tokens few", "few"),
        ("--temperature -1", "temperature = -1"),
        ("--temperature nan", "temperature = nan"),
        ("--top-p 0", "top_p = 0"),
        ("--top-k -5", "top_k = -5"),
        ("--min-p 2", "min_p = 2"),
        ("--dtype int8", "dtype = 'int8'"),
        ("--device gpu", "device = 'gpu'"),
        ("--max-model-len 65", "max_model_len = 65"),
        ("--max-model-len 0", "max_model_len = 0"),
        ("--chat", "chat template"),
    ],
)
def test_generate_options(options: str, line: str, model: Model, command: Command, refused: Refused) -> None:
    assert line in refused([*command("generate", model()), *options.split()])


def test_prompts(model: Model, command: Command, refused: Refused) -> None:
    arguments = command("generate", model())
    assert "64" in refused([*arguments, "--prompt", "w1 " * 64])
    assert "prompt" in refused([*arguments, "--prompt", ""])


@pytest.mark.parametrize("options, line", [
    ("--sequence-length 65", "sequence_length = 65"),
    ("--sequence-length 0", "sequence_length = 0"),
    ("--max-tokens -1", "max_tokens = -1"),
    ("--dtype fp8", "dtype = 'fp8'"),
])  # fmt: skip
def test_eval_options(options: str, line: str, model: Model, command: Command, refused: Refused) -> None:
    assert line in refused([*command("eval", model()), *options.split()])


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "empty", "directory", "missing", "spaces"])
@pytest.mark.parametrize("verb", ["train", "eval", "verify"])
def test_corpora(encoding: str, verb: str, text: Path, model: Model, command: Command, refused: Refused) -> None:
    path = model()
    arguments = command("upcycle" if verb == "verify" else verb, path)
    if verb == "verify":
        arguments += ["--verify", "--text", str(text)]
    text.unlink()
    if encoding == "directory":
        text.mkdir()
    elif encoding in ("empty", "spaces"):
        text.write_text("" if encoding == "empty" else " \n" * 9)
    elif encoding != "missing":
        text.write_bytes(("w1 w2 déjà vu " * 99).encode(encoding))
    line = refused(arguments)
    assert str(text) in line
    if encoding in ("utf-16", "latin-1"):
        assert "UTF-8" in line and "byte" in line
    if encoding == "empty":
        assert "empty" in line


@pytest.mark.parametrize(
    "setting, line",
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key; [optimizer] has kind, lr,"),
        ("data.sequence_lenght=9", "data.sequence_lenght: unknown key; did you mean data.sequence_length?"),
        ("optimiser.lr=1", "optimiser: unknown section; did you mean optimizer?"),
        ("train.steps=-1", "train.steps = -1: must be"),
        ("train.steps=many", 'train.steps = "many": must be'),
        ("schedule.kind=linear", 'schedule.kind = "linear": must be'),
        ("router.aux_loss=mine", 'router.aux_loss = "mine": must be'),
        ("train.micro_batch_sequences=3", "train.micro_batch_sequences = 3"),
        ("router.group_sequences=2", "router.group_sequences"),
        ("data.sequence_length=65", "data.sequence_length = 65"),
        ("data.sequence_length=5000", "data.sequence_length = 5000"),
        ("model.device=tpu", "model.device = 'tpu': must be auto, cpu"),
        ('model.recompute=["layers.7.ffn"]', "layers.7.ffn"),
        ("data.train.0.path=/nowhere", "'/nowhere': no such file or directory"),
        ("data.train.0.format=parquet", "not a Parquet file"),
        ("data.train.0.format=jsonl", "not JSON"),
        ("nonsense", "--set nonsense: must be key=value"),
    ],
)
def test_training_settings(setting: str, line: str, model: Model, command: Command, refused: Refused) -> None:
    arguments = [*command("train", model()), "--set", setting]
    if setting == "router.group_sequences=2":
        arguments += ["--set", "train.micro_batch_sequences=1"]
    assert line in refused(arguments)


def test_training_files(tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "config.toml"
    for verb in (["train"], ["plan", "train"]):
        assert "no such file" in refused([*verb, str(file)])
        if verb == ["train"]:  # to the planner a directory is a model
            assert "cannot read the configuration" in refused([*verb, str(tmp_path)])
    file.write_text("[model\n")
    assert "not valid TOML" in refused(["train", str(file)])
    file.write_bytes("[model]\npath = 'é'".encode("latin-1"))
    assert "not UTF-8" in refused(["train", str(file)])
    file.write_text("")
    assert "missing" in refused(["train", str(file)])
    assert "CONFIG.toml: missing" in refused(["train"])


@pytest.fixture
def run(tmp_path: Path, model: Model, command: Command, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """A run of a mixture, killed after its last checkpoint: the command line that made it."""
    arguments = command("train", model("moe"))
    assert main(arguments) == 0, capfd.readouterr().err
    shutil.rmtree(tmp_path / "run" / "final")
    return arguments


def test_resume_with_another_configuration(run: list[str], refused: Refused) -> None:
    line = refused([*run, "--set", "optimizer.lr=0.5"])
    assert line.startswith("optimizer.lr = 0.5: the checkpoint ") and "was trained with 0.0001" in line
    assert "holds a run already" in refused([*run, "--resume", "never"])


def test_damaged_training_checkpoints(tmp_path: Path, run: list[str], refused: Refused) -> None:
    arguments = [*run, "--set", "train.steps=4"]
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    whole = {file: file.read_bytes() for file in newest.iterdir()}
    for name in ("__0_0.distcp", ".metadata", "trainer.json"):
        for damage in ("cut", "missing", "garbage"):
            if damage == "missing":
                (newest / name).unlink()
            else:
                content = whole[newest / name]
                (newest / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x07" * 50)
            assert str(newest) in refused(arguments)
            assert str(newest) in refused([*arguments, "--resume", str(newest)])
            (newest / name).write_bytes(whole[newest / name])
    assert "not a training checkpoint" in refused([*arguments, "--resume", str(tmp_path / "run")])
    assert "not a training checkpoint" in refused([*arguments, "--resume", "/nowhere"])


def test_plans(tmp_path: Path, model: Model, command: Command, refused: Refused) -> None:
    arguments, plan = command("train", model()), tmp_path / "plan.json"
    for content in (None, "", "{}", "[]", '{"stages": 3}'):
        if content is not None:
            plan.write_text(content)
        assert str(plan) in refused([*arguments, "--plan", str(plan)])


def test_reports(tmp_path: Path, text: Path, refused: Refused) -> None:
    assert "not a directory" in refused(["report", str(tmp_path / "nowhere")])
    assert "not a directory" in refused(["report", str(text)])
    assert "holds no metrics.jsonl" in refused(["report", str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no row" in refused(["report", str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("[1]\n{}\nnot json\n")
    assert "no row" in refused(["report", str(tmp_path)])


def test_reports_that_cannot_be_written(tmp_path: Path, run: list[str], refused: Refused) -> None:
    report = ["report", str(tmp_path / "run"), "--out"]
    assert f"--out {tmp_path}: is a directory" in refused([*report, str(tmp_path)])
    assert "does not exist" in refused([*report, str(tmp_path / "no" / "x.html")])
    assert "is given twice" in refused(["report", str(tmp_path / "run"), str(tmp_path / "run")])


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_where_a_directory_should_be(
    key: str, below: str, text: Path, model: Model, command: Command, refused: Refused
) -> None:
    line = refused([*command("train", model()), "--set", f"{key}={text}{below}"])
    assert f"{text}{below}" in line


def test_nothing_is_said_beside_the_result(tmp_path: Path, model: Model, train_file: Callable[..., Path]) -> None:
    """transformers knows no model_type "moeforge" and says so; that is no news to who made the model."""
    path = model("moe")
    assert "rope_scaling" not in json.loads((path / "config.json").read_text())
    generate, train = programs(["generate", str(path), "--prompt", "w1"], ["train", str(train_file(path))])
    assert (generate.code, generate.err) == (0, "")
    assert train.code == 0
    for noise in ("Warning", "warn", "You are using", "deprecated"):
        assert noise not in train.err


class Done(NamedTuple):
    code: int
    out: str
    err: str


def programs(*lines: list[str], preexec: Callable[[], None] | None = None) -> list[Done]:
    """Command lines one after the other, in a process of their own that has done nothing else."""
    program = (
        "import json, sys; from moeforge.cli.app import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    print(end=f'\\0{main(line)}\\0', flush=True); print(end='\\0', file=sys.stderr, flush=True)"
    )
    command = [sys.executable, "-c", program, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=preexec)
    out, err = done.stdout.split("\0")[:-1], done.stderr.split("\0")[:-1]
    assert len(err) == len(lines), done.stderr
    return [Done(int(out[2 * i + 1]), out[2 * i], err[i]) for i in range(len(lines))]


def no_privileges() -> None:
    """Root in the child may no longer read what its mode forbids: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="drops Linux capabilities")
def test_files_that_may_not_be_read_or_written(tmp_path: Path, model: Model, command: Command) -> None:
    path, closed = model(), tmp_path / "closed"
    closed.mkdir(mode=0o500)
    (path / WEIGHTS).chmod(0)
    runs = {
        str(path / WEIGHTS): command("inspect", path),
        str(closed): ["upcycle", str(model("sharded")), str(closed / "out"), "--experts", "4"],
    }
    for named, done in zip(runs, programs(*runs.values(), preexec=no_privileges), strict=True):
        assert (done.code, done.out) == (2, ""), done.err
        assert named in done.err and done.err.count("\n") == 1
    assert list(closed.iterdir()) == []
