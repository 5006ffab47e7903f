"""Bad input through the command line: one clear line, exit code 2, nothing half-written, nothing lost."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moeforge.cli.app import main

VERBS = ("upcycle", "train", "eval", "generate", "inspect")
WEIGHTS = "model.safetensors"
Refused = Callable[..., str]
Command = Callable[..., list[str]]
Model = Callable[..., Path]
every_verb = pytest.mark.parametrize("verb", VERBS)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def to_bin(directory: Path, extra: object = None) -> None:
    state: dict[str, object] = dict(load_file(directory / WEIGHTS))
    torch.save(state if extra is None else state | {"model.optimizer": extra}, directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


class Payload:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickle-was-executed",)


# Each damages a good model directory and says what the line must hold.


def no_config(path: Path) -> str:
    (path / "config.json").unlink()
    return "no config.json"


def no_weights(path: Path) -> str:
    (path / WEIGHTS).unlink()
    return "no weights there"


def empty_directory(path: Path) -> str:
    shutil.rmtree(path)
    path.mkdir()
    return "no config.json"


def config_cut(path: Path) -> str:
    truncate(path / "config.json", 0.5)
    return "config.json: is not JSON"


def config_empty(path: Path) -> str:
    (path / "config.json").write_text("")
    return "config.json: is not JSON"


def config_not_text(path: Path) -> str:
    (path / "config.json").write_bytes(b"\xff\xfe\x00\x01")
    return "config.json: is not JSON"


def config_a_list(path: Path) -> str:
    (path / "config.json").write_text("[]")
    return "must be a JSON object"


def config_a_directory(path: Path) -> str:
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    return "no config.json"


def weights_cut(path: Path) -> str:
    truncate(path / WEIGHTS, 0.6)
    return f"{WEIGHTS}: cannot be read as safetensors"


def weights_header_cut(path: Path) -> str:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:100])
    return f"{WEIGHTS}: cannot be read as safetensors"


def weights_empty(path: Path) -> str:
    (path / WEIGHTS).write_bytes(b"")
    return f"{WEIGHTS}: cannot be read as safetensors"


def weights_garbage(path: Path) -> str:
    (path / WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 100)
    return f"{WEIGHTS}: cannot be read as safetensors"


def weights_an_lfs_pointer(path: Path) -> str:
    (path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n")
    return f"{WEIGHTS}: cannot be read as safetensors"


def tensor_lost(path: Path) -> str:
    state = load_file(path / WEIGHTS)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path / WEIGHTS)
    return "1 tensors missing: model.layers.1.mlp.up_proj.weight"


def tensor_of_another_shape(path: Path) -> str:
    edit_json(path / "config.json", intermediate_size=40)
    return "has shape (32, 32); config.json asks for (40, 32)"


def pickled_code(path: Path) -> str:
    to_bin(path, Payload())
    return "not a weights-only checkpoint"


def bare_pickle(path: Path) -> str:
    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    return "not a weights-only checkpoint"


def torch_archive_cut(path: Path) -> str:
    to_bin(path)
    truncate(path / "pytorch_model.bin", 0.6)
    return "pytorch_model.bin: cannot be read as a torch archive"


def unknown_architecture(path: Path) -> str:
    edit_json(path / "config.json", model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    return "model_type = 'gpt_neox' (architecture GPTNeoXForCausalLM) is not supported; supported are llama"


def no_architecture(path: Path) -> str:
    (path / "config.json").write_text("{}")
    return "model_type = ''"


def size_missing(path: Path) -> str:
    edit_json(path / "config.json", hidden_size=None)
    return "hidden_size = None: must be a positive whole number"


def size_of_words(path: Path) -> str:
    edit_json(path / "config.json", num_hidden_layers="two")
    return "num_hidden_layers = two: must be a positive whole number"


def no_positions(path: Path) -> str:
    edit_json(path / "config.json", max_position_embeddings=0)
    return "max_position_embeddings = 0: must be a positive whole number"


def number_in_words(path: Path) -> str:
    edit_json(path / "config.json", rms_norm_eps="small")
    return "rms_norm_eps = small: must be"


def heads_of_words(path: Path) -> str:
    edit_json(path / "config.json", num_key_value_heads="two")
    return "num_key_value_heads = two: must be"


def already_quantised(path: Path) -> str:
    edit_json(path / "config.json", quantization_config={"quant_method": "gptq"})
    return 'quantization_config.quant_method = "gptq" is not supported'


DAMAGES = (
    no_config, no_weights, empty_directory, config_cut, config_empty, config_not_text, config_a_list,
    config_a_directory, weights_cut, weights_header_cut, weights_empty, weights_garbage, weights_an_lfs_pointer,
    tensor_lost, tensor_of_another_shape, pickled_code, bare_pickle, torch_archive_cut, unknown_architecture,
    no_architecture, size_missing, size_of_words, no_positions, number_in_words, heads_of_words,
    already_quantised,
)  # fmt: skip


@every_verb
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directory(
    verb: str, damage: Callable[[Path], str], model: Model, command: Command, refused: Refused
) -> None:
    path = model()
    expected = damage(path)
    assert expected in refused(command(verb, path))
    assert not Path("pickle-was-executed").exists()


@every_verb
def test_half_downloaded_shards(verb: str, model: Model, command: Command, refused: Refused) -> None:
    path = model("sharded")
    shards = sorted(path.glob("model-*.safetensors"))
    arguments = command(verb, path)
    truncate(shards[1], 0.5)
    assert f"{shards[1].name}: cannot be read as safetensors" in refused(arguments)
    shards[1].unlink()
    assert f"{shards[1].name}: is missing (1 of {len(shards)} shards are)" in refused(arguments)
    truncate(path / f"{WEIGHTS}.index.json", 0.5)
    assert "cannot be read as an index" in refused(arguments)


@every_verb
@pytest.mark.parametrize(
    "name, line",
    [
        ("nowhere", "model = 'nowhere': no such directory or file; presets are"),
        ("/nowhere/at/all", "no such directory or file"),
        ("", "model = ''"),
        ("nobody/nothing", "'nobody/nothing': no such directory here, not in the local cache"),
        ("mixtral-8x7b", "not in the local cache, and the hub cannot be reached"),
    ],
)
def test_no_such_model(verb: str, name: str, line: str, command: Command, refused: Refused) -> None:
    if verb == "train" and name == "":
        line = "model.path"
    assert line in refused(command(verb, name))


@every_verb
def test_file_that_is_no_model(verb: str, tmp_path: Path, command: Command, refused: Refused) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x" * 100)
    assert f"{file}: neither a directory nor a .gguf file" in refused(command(verb, file))


def write_gguf(path: Path, architecture: str = "llama", kind: gguf.GGMLQuantizationType | None = None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<eos>", "w", "1", "w1", *(f"<{i}>" for i in range(59))])
    writer.add_token_merges(["w 1"])
    writer.add_eos_token_id(1)
    parts = {"attn_q": 256, "attn_k": 256, "attn_v": 256, "attn_output": 256, "ffn_gate": 256, "ffn_up": 256}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (64, 256), "output_norm.weight": (256,), "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_norm.weight": (256,), "blk.0.ffn_down.weight": (256, 256),
        **{f"blk.0.{part}.weight": (rows, 256) for part, rows in parts.items()},
    }  # fmt: skip
    for name, shape in shapes.items():
        if kind is None or len(shape) == 1:
            writer.add_tensor(name, np.full(shape, 0.01, np.float32))
        else:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            raw = np.zeros((shape[0], shape[1] // block * size), np.uint8)
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@every_verb
def test_damaged_gguf(verb: str, tmp_path: Path, command: Command, refused: Refused) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    whole = path.read_bytes()
    arguments = command(verb, path)
    for content in (b"", whole[:3], whole[:100], whole[:900], whole[: len(whole) // 2], b"GGUF" + b"\xff" * 400,
                    b"<!DOCTYPE html>" * 100, whole[:4] + b"\x63" + whole[5:]):  # fmt: skip
        path.write_bytes(content)
        assert f"{path}: cannot be read as GGUF" in refused(arguments)


@every_verb
def test_gguf_of_another_architecture(verb: str, tmp_path: Path, command: Command, refused: Refused) -> None:
    path = write_gguf(tmp_path / "model.gguf", "bert")
    assert "general.architecture = 'bert' is not supported; supported" in refused(command(verb, path))


@pytest.mark.parametrize("verb", VERBS[:-1])
def test_gguf_quantisation_that_cannot_be_read(verb: str, tmp_path: Path, command: Command, refused: Refused) -> None:
    kind = gguf.GGMLQuantizationType.Q8_1  # llama.cpp's format of intermediates, which no file should hold
    path = write_gguf(tmp_path / "model.gguf", kind=kind)
    assert "is quantised as Q8_1, which cannot be read; convert the file to one of" in refused(command(verb, path))


@pytest.mark.parametrize("verb", VERBS[:-1])
def test_tokenizer_larger_than_the_embedding(
    verb: str, model: Model, save_tokenizer: Callable[..., None], command: Command, refused: Refused
) -> None:
    path = model()
    save_tokenizer(path, words=70)
    line = refused(command(verb, path))
    assert "the tokenizer has 72 tokens but the embedding only 64 rows (vocab_size)" in line


@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
@pytest.mark.parametrize("damage", ["missing", "cut", "list"])
def test_damaged_tokenizer(verb: str, damage: str, model: Model, command: Command, refused: Refused) -> None:
    path = model()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if damage == "missing":
            (path / file).unlink()
        elif damage == "cut":
            truncate(path / file, 0.5)
        else:
            (path / file).write_text("[]")
    assert f"{path}: no tokenizer can be loaded from it" in refused(command(verb, path))


@pytest.mark.parametrize("verb", VERBS[:-1])
@pytest.mark.parametrize("value, word", [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_not_finite(
    verb: str, value: float, word: str, model: Model, command: Command, refused: Refused
) -> None:
    path = model()
    state = load_file(path / WEIGHTS)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(state, path / WEIGHTS)
    line = refused(command(verb, path))
    assert f"holds {word} weights" in line and "1." in line and str(path) in line


@every_verb
@pytest.mark.parametrize(
    "changes, line",
    [
        ({"top_k": 5}, "moe.top_k = 5: must be between 1 and the number of experts (4)"),
        ({"top_k": 1}, "moe.top_k = 1 with moe.renormalize = true"),
        ({"num_experts": 2}, "gate normalisation needs at least 3 experts"),
        ({"gate_norm": -1.0}, "moe.gate_norm = -1.0: must be a positive number"),
        ({"experts": 4}, "moe.experts: unknown key; known are num_experts,"),
        ({"top_k": "two"}, "moe.top_k = 'two': must be a whole number"),
    ],
)
def test_impossible_mixture_on_disk(
    verb: str, changes: dict[str, Any], line: str, model: Model, command: Command, refused: Refused
) -> None:
    path = model("moe")
    own = json.loads((path / "config.json").read_text())["moeforge"]
    edit_json(path / "config.json", moeforge={**own, "moe": {**own["moe"], **changes}})
    assert line in refused(command(verb, path))


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
    """A finished run of a mixture: the command line that made it."""
    arguments = command("train", model("moe"))
    assert main(arguments) == 0, capfd.readouterr().err
    return arguments


def test_resume_with_another_configuration(run: list[str], refused: Refused) -> None:
    line = refused([*run, "--set", "optimizer.lr=0.5"])
    assert line.startswith("optimizer.lr = 0.5: the checkpoint ") and "was trained with 0.0001" in line
    assert "holds a run already" in refused([*run, "--resume", "never"])


def test_damaged_training_checkpoints(tmp_path: Path, run: list[str], refused: Refused) -> None:
    arguments = [*run, "--set", "train.steps=4"]
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    whole = {file: file.read_bytes() for file in newest.iterdir()}
    for name in ("optimizer.safetensors", WEIGHTS, "trainer.json", "config.json"):
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
    generate = python("generate", path, "--prompt", "w1")
    assert (generate.returncode, generate.stderr) == (0, "")
    train = python("train", train_file(path))
    assert train.returncode == 0
    for noise in ("Warning", "warn", "You are using", "deprecated"):
        assert noise not in train.stderr


def python(*arguments: object, preexec: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """`moeforge` as a program of its own."""
    command = [sys.executable, "-m", "moeforge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=preexec)


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
    for named, arguments in runs.items():
        done = python(*arguments, preexec=no_privileges)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert named in done.stderr and done.stderr.count("\n") == 1
    assert list(closed.iterdir()) == []
