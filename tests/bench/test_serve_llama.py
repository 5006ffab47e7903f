from __future__ import annotations

import stat
from pathlib import Path

import pytest

from moeforge.bench import serve_llama
from moeforge.bench.serve_llama import LlamaCpp, seconds_of
from moeforge.bench.serve_side import Workload
from moeforge.errors import RunError

ROW = (
    '{"n_kv_max": 2048, "n_batch": 2048, "n_ubatch": 512, "flash_attn": 1, "is_pp_shared": 0, "n_gpu_layers": -1, '
    '"n_threads": 2, "n_threads_batch": 2, "pp": %d, "tg": %d, "pl": %d, "n_kv": 1016, "t_pp": %f, '
    '"speed_pp": 270.068268, "t_tg": %f, "speed_tg": 116.650337, "t": 6.216422, "speed": 163.438065}\n'
)


def test_the_last_run_counts() -> None:
    output = "build: 0\n" + ROW % (64, 63, 8, 2.5, 9.0) + ROW % (64, 63, 8, 1.5, 4.0) + "\nllama_perf: load time\n"
    assert seconds_of(output, Workload("8", 8, 64, 64)) == 5.5
    assert seconds_of(ROW % (512, 1, 1, 1.5, 0.25), Workload("prefill_512", 1, 512, 1)) == 1.5
    for nothing in ("", "main: n_kv_max = 256\n", ROW % (64, 63, 1, 1.0, 1.0)):
        with pytest.raises(RunError, match="printed no measurement"):
            seconds_of(nothing, Workload("8", 8, 64, 64))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama.cpp whose programs are scripts: the benchmark writes down how it was called."""
    monkeypatch.setattr(serve_llama.sys, "executable", "/bin/sh")
    (tmp_path / "convert_hf_to_gguf.py").write_text('echo gguf > "$3"\n')
    bench = tmp_path / "build" / "bin" / "llama-batched-bench"
    bench.parent.mkdir(parents=True)
    bench.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "version: 0.5.0 (build 1)" >&2; exit; fi\n'
        f'echo "$@" > {tmp_path}/called\n'
        f"cat <<'END'\n{ROW % (64, 63, 8, 1.0, 3.0)}END\n"
    )
    bench.chmod(bench.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def test_it_converts_once_and_runs_twice_as_many(folder: Path) -> None:
    side = LlamaCpp(folder, Path("model"), folder, threads=2)
    assert side.about["version"] == "0.5.0 (build 1)" and (folder / "model.gguf").exists()
    run = side.run(Workload("8", 8, 64, 64), [], "flash-attn off")
    assert run["seconds"] == 4.0
    called = (folder / "called").read_text()
    assert "-t 2 -fa off -c 1016 -npp 64 -ntg 63 -npl 8,8 --output-format jsonl" in called
    side.close()
    assert not (folder / "model.gguf").exists()


def test_its_last_line_explains_a_failure(folder: Path) -> None:
    (folder / "convert_hf_to_gguf.py").write_text("echo loading >&2; echo 'unknown tokenizer' >&2; exit 1\n")
    with pytest.raises(RunError, match="unknown tokenizer"):
        LlamaCpp(folder, Path("model"), folder, threads=2)
