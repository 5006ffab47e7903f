"""`moeforge generate` and `moeforge eval` on a small model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from moeforge.cli.app import main
from moeforge.serve import LLM, SamplingParams

Saved = Callable[[str], Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_generate_prints_what_the_library_returns(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved("mixtral")
    params = SamplingParams(temperature=0.9, seed=4, top_k=20, max_tokens=7)
    expected = LLM(model).generate("Hello", params)[0].outputs[0]
    options = ("--temperature", 0.9, "--seed", 4, "--top-k", 20, "--max-tokens", 7)
    code, out, _ = run(capsys, "generate", model, "--prompt", "Hello", *options, "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["text"], result["token_ids"]) == (expected.text, expected.token_ids)
    code, out, _ = run(capsys, "generate", model, "--prompt", "Hello", *options)
    assert (code, out) == (0, expected.text + "\n")


def test_generate_streams_to_a_terminal(
    saved: Saved, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved("llama")
    expected = LLM(model).chat([{"role": "user", "content": "Hi"}], SamplingParams(temperature=0, max_tokens=9))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    code, out, _ = run(capsys, "generate", model, "--prompt", "Hi", "--chat", "--max-tokens", 9)
    assert (code, out) == (0, expected[0].outputs[0].text + "\n")


def test_eval_of_a_file(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ein Text über Häfen. " * 9, encoding="utf-8")
    code, out, _ = run(capsys, "eval", saved("llama"), "--text", text, "--json", "--dtype", "fp32")
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"loss", "perplexity", "tokens"}
    assert result["tokens"] == len(text.read_bytes()) - 1
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_eval_of_the_python_topics(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max-tokens", 500, "--sequence-length", 64)
    code, out, _ = run(capsys, "eval", saved("llama"), *options, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 500
    code, out, _ = run(capsys, "eval", saved("llama"), *options)
    assert code == 0 and "500 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "MODEL", "--prompt", "x", "--top-p", 2), "top_p = 2.0"),
        (("generate", "MODEL", "--prompt", "x" * 96), "96 tokens"),
        (("generate", "MODEL", "--prompt", "x", "--dtype", "int3"), "dtype = 'int3'"),
        (("eval", "MODEL", "--text", "/nowhere/text"), "'/nowhere/text': cannot be read"),
        (("eval", "MODEL", "--sequence-length", 97), "sequence_length = 97"),
        (("eval", "MODEL", "--max-tokens", 0), "max_tokens = 0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    saved: Saved, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    code, out, err = run(capsys, *(saved("llama") if a == "MODEL" else a for a in arguments))
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_text_in_another_encoding_is_refused(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "latin1.txt"
    text.write_bytes("abc é".encode("latin-1"))
    code, _, err = run(capsys, "eval", saved("llama"), "--text", text)
    assert code == 2 and "is not UTF-8 (byte 4)" in err
