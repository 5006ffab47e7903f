"""Bad models through the command line, verb by verb: one clear line, exit code 2, no file written or changed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
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


def more_layers_than_tensors(path: Path) -> str:
    edit_json(path / "config.json", num_hidden_layers=10**12)
    return "asks for 1000000000000 layers and 0 experts, but the files hold only 21 tensors"


def more_layers_than_tensors_in_fp8(path: Path) -> str:
    edit_json(path / "config.json", num_hidden_layers=10**12, quantization_config={"quant_method": "fp8"})
    return "asks for 1000000000000 layers and 0 experts, but the files hold only 21 tensors"


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
    more_layers_than_tensors, more_layers_than_tensors_in_fp8, already_quantised,
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


def write_gguf(
    path: Path, architecture: str = "llama", kind: gguf.GGMLQuantizationType | None = None, tokens: int = 64
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<eos>", "w", "1", "w1", *(f"<{i}>" for i in range(tokens - 5))])
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
    assert "the tokenizer gives ids up to 71 but the embedding has only 64 rows (vocab_size)" in line


@pytest.mark.parametrize("verb", VERBS[:-1])
def test_gguf_tokenizer_larger_than_the_embedding(
    verb: str, tmp_path: Path, command: Command, refused: Refused
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tokens=70)
    assert f"{path}: the tokenizer gives ids up to 69 but the embedding has only 64 rows" in refused(
        command(verb, path)
    )


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


def test_flipped_bytes(tmp_path: Path, model: Model, refused: Refused, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever a damaged header says, it is understood or refused in one line."""
    path = model()
    generator = random.Random(0)
    files = {
        write_gguf(tmp_path / "model.gguf"): (tmp_path / "model.gguf", 3000),
        path / WEIGHTS: (path, 2500),
        path / "config.json": (path, 900),
    }
    for file, (named, header) in files.items():
        whole = file.read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(generator.randrange(1, 4)):
                content[generator.randrange(min(header, len(whole)))] = generator.choice(b'\0\xff"{}[]-09x')
            file.write_bytes(content)
            if main(["inspect", str(named), "--json"]) != 0:
                refused(["inspect", str(named)])
        file.write_bytes(whole)
