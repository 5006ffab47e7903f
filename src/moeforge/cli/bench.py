"""`moeforge bench`: ours against the peers, in one run."""

from __future__ import annotations

import json as jsonlib
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moeforge.cli.output import Json, emit, jsonable, stderr_console
from moeforge.errors import UserError
from moeforge.files import write_whole


def train(
    against: Annotated[
        Literal["hf"], typer.Option(help="The peer: hf = transformers with its best expert implementation.")
    ] = "hf",
    model: Annotated[str | None, typer.Option(help="Dense model to upcycle; default: that of quickstart.")] = None,
    experts: Annotated[int, typer.Option(help="Experts of every layer, top-2.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Alternating runs of each side.")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Ratios to measure: ratio_bf16_pure, ratio_bf16_master, ratio_fp32; default all."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    json: Json = False,
) -> None:
    """Training steps a second of an upcycled model.

    Full optimiser steps of 4 x 256 tokens, ours and the peer's in alternating runs.
    """
    import torch

    from moeforge.bench.train import RATIOS, TrainBench
    from moeforge.checkpoint import open_checkpoint
    from moeforge.cli.quickstart import packaged_model
    from moeforge.data import python_corpus
    from moeforge.upcycle import UpcycleConfig, upcycle

    ratios = only or list(RATIOS)
    if unknown := [name for name in ratios if name not in RATIOS]:
        raise UserError(f"--only {unknown[0]}: must be one of {', '.join(RATIOS)}")
    console = stderr_console()
    with tempfile.TemporaryDirectory() as scratch:
        dense = open_checkpoint(model or packaged_model())
        # Without gate normalisation the directory is a Mixtral, which both sides read.
        made = upcycle(dense, Path(scratch) / "moe", UpcycleConfig(num_experts=experts, gate_norm=None, dtype="bf16"))
        tokenizer = dense.tokenizer()
        ids = [token for text in python_corpus(0)[0] for token in tokenizer(text, verbose=False)["input_ids"]]
        tokens = Path(scratch) / "tokens.pt"
        torch.save(torch.tensor(ids), tokens)
        bench = TrainBench(
            made.path, tokens, made.config, runs=runs, note=lambda line: console.print(line, soft_wrap=True)
        )
        result = bench.run(ratios)
    emit(result, json, "\n".join(f"{name}: {result[name]:.2f}" for name in ratios))
    if out is not None:  # last: what took minutes to measure is shown even if it cannot be written
        write_whole(out, jsonlib.dumps(result, indent=2) + "\n")


def serve(
    against: Annotated[
        list[str] | None, typer.Option(help="Peers: hf (transformers), vllm, llama.cpp; default all three.")
    ] = None,
    peers_dir: Annotated[Path | None, typer.Option(help="The folder that benchmarks/peers.sh has filled.")] = None,
    model: Annotated[str | None, typer.Option(help="Dense model to upcycle; default: that of quickstart.")] = None,
    experts: Annotated[int, typer.Option(help="Experts of every layer, top-2.")] = 8,
    concurrency: Annotated[str, typer.Option(help="Numbers of requests at once, with commas.")] = "1,8,32",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    output_len: Annotated[int, typer.Option(min=2, help="New tokens of a request.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Alternating runs of each side.")] = 3,
    rate: Annotated[
        float | None, typer.Option(help="Instead: latencies over HTTP under Poisson arrivals, so many a second.")
    ] = None,
    http: Annotated[
        bool, typer.Option("--http", help="Instead: latencies over HTTP with --concurrency clients.")
    ] = False,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each load over HTTP.")] = 100,
    seed: Annotated[int, typer.Option(help="Of arrival times and prompts over HTTP.")] = 0,
    url: Annotated[
        str | None, typer.Option(help="A running server to load; default: one of ours with the upcycled model.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="The key of that server; default: MOEFORGE_API_KEY.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    json: Json = False,
) -> None:
    """Generated tokens a second of an upcycled model, or a server's latencies.

    Ours and the peers' in alternating runs, each engine in a process of its own: random prompts of token ids, greedy,
    end tokens ignored, no prefix cache, bf16. With --rate or --http: streaming requests to one server.
    """
    over_http = http or rate is not None or url is not None
    if over_http and (against or peers_dir):
        raise UserError("--against, --peers-dir: are not for loads over HTTP; leave them out, or --rate, --http, --url")
    if rate is not None and (http or not 0 < rate < float("inf")):
        raise UserError(f"--rate {rate}: must be above 0, and without --http")
    if api_key_file is not None and url is None:
        raise UserError("--api-key-file: belongs to --url; a server of our own here has no key")
    counts = _counts("--concurrency", concurrency)
    if url is not None:
        result = _load(url, 1000, input_len, output_len, counts, rate, requests, seed, api_key_file)
        _emit_serve(result, json, out)
        return

    from moeforge.bench.serve_peers import PEERS, check_peers
    from moeforge.checkpoint import open_checkpoint
    from moeforge.cli.quickstart import packaged_model
    from moeforge.upcycle import UpcycleConfig, upcycle

    peers = list(dict.fromkeys(against or PEERS))
    if not over_http:
        check_peers(peers, peers_dir)
    with tempfile.TemporaryDirectory() as scratch:
        # Without gate normalisation the directory is a Mixtral, which all sides read.
        made = upcycle(
            open_checkpoint(model or packaged_model()),
            Path(scratch) / "moe",
            UpcycleConfig(num_experts=experts, gate_norm=None, dtype="bf16"),
        )
        vocab_size = made.config.vocab_size
        if over_http:
            from moeforge.bench.serve_process import server

            with server([made.path, "--no-enable-prefix-caching"]) as started:
                result = _load(started, vocab_size, input_len, output_len, counts, rate, requests, seed, None)
        else:
            from moeforge.bench.serve import ServeBench

            console = stderr_console()
            result = ServeBench(
                made.path, vocab_size, peers, peers_dir, Path(scratch), counts, input_len, output_len, runs=runs,
                note=lambda line: console.print(line, soft_wrap=True, highlight=False),
            ).run()  # fmt: skip
    _emit_serve(result, json, out)


def _counts(option: str, given: str) -> list[int]:
    try:
        counts = [int(count) for count in given.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UserError(f"{option} {given}: must be whole numbers from 1 on, with commas between them")
    return list(dict.fromkeys(counts))


def _load(
    url: str,
    vocab_size: int,
    input_len: int,
    output_len: int,
    counts: list[int],
    rate: float | None,
    requests: int,
    seed: int,
    api_key_file: Path | None,
) -> dict[str, Any]:
    try:
        from moeforge.bench.serve_load import Load
        from moeforge.serve.openai.settings import read_keys
    except ImportError as error:
        raise UserError("--rate, --http, --url: need the package httpx; run pip install httpx") from error

    keys = read_keys(api_key_file)
    load = Load(url, vocab_size, input_len, output_len, seed, keys[0].decode() if keys else None)
    loads = (
        [load.closed_loop(count, requests) for count in counts] if rate is None else [load.open_loop(rate, requests)]
    )
    return {"model": load.model, "input_tokens": input_len, "output_tokens": output_len, "loads": loads}


def _emit_serve(result: dict[str, Any], json: bool, out: Path | None) -> None:
    def human() -> str:
        if "loads" in result:
            return "\n".join(
                f"{load.get('rate') or load.get('concurrency')}: {load['output_tokens_per_second']:.1f} tokens/s, "
                f"TTFT {_shown(load['ttft_ms'])}, between tokens {_shown(load['inter_token_ms'])}, "
                f"in all {_shown(load['end_to_end_ms'])}, {load['errors']} errors"
                for load in result["loads"]
            )
        return "\n".join(
            f"{count} at once: {ratio:.2f} x {result['best_peer'][count]}"
            for count, ratio in result["ratio_at"].items()
        )

    emit(result, json, human)
    if out is not None:  # last: what took minutes to measure is shown even if it cannot be written
        write_whole(out, jsonlib.dumps(result, indent=2) + "\n")


def _shown(latency: dict[str, float] | None) -> str:
    return "-" if latency is None else f"{latency['p50']:.0f} / {latency['p90']:.0f} / {latency['p99']:.0f} ms"


def kernels(
    rows: Annotated[str, typer.Option(help="Tokens of a decode step, with commas.")] = "1,8,32,64",
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="First measure tile sizes on this GPU, which takes a minute or more, and keep the fastest."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    json: Json = False,
) -> None:
    """What kernels reach of this machine's memory bandwidth and matmul rate, and of the peers' speed.

    On a CPU those of a decode step in bf16 and FP8, against oneDNN and torch; on a GPU those of training and decoding,
    against torch and transformers. Nothing else should run meanwhile.
    """
    import torch

    from moeforge.bench.kernels_tune import check_tunable, tune_here
    from moeforge.cli.kernel_tables import cpu_tables, gpu_table

    counts, console = _counts("--rows", rows), stderr_console()

    def note(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    tuned = {}
    if tune:
        check_tunable()
        tuned = {"tuned": tune_here()}
    if torch.cuda.is_available():
        from moeforge.bench.gpu import facts, kernel_cases, run_cases

        device = torch.device("cuda", torch.cuda.current_device())
        cases = list(run_cases(kernel_cases(device, counts), note))
        result = {**facts(device), **tuned, "cases": cases}
        emit(result, json, lambda: gpu_table(cases))
    else:
        from moeforge.bench.kernels import KernelBench, models
        from moeforge.heap import keep_freed_memory

        keep_freed_memory()
        result = KernelBench(counts).run(models(), note)
        emit(result, json, lambda: cpu_tables(result))
    if out is not None:  # last: what took minutes to measure is shown even if it cannot be written
        write_whole(out, jsonlib.dumps(jsonable(result), indent=2) + "\n")


def calibrate(
    out: Annotated[Path, typer.Option(help="The TOML file to write.")],
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Devices that compute at once; default: all GPUs, or one process on all cores."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Also time the units of this model (preset, directory).")] = None,
    precision: Annotated[str, typer.Option(help="As model.precision: bf16, bf16_pure, fp32, fp64.")] = "bf16",
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    micro_batch_sequences: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 1,
    json: Json = False,
) -> None:
    """Measure this machine for the planner: matmuls, memory, links, and if wanted the units of a model.

    Nothing else should run meanwhile. On a CPU the cores and the memory are divided over the processes.
    """
    from moeforge.bench.calibrate import ModelCase, profile_toml
    from moeforge.bench.calibrate import calibrate as measure
    from moeforge.checkpoint import open_checkpoint
    from moeforge.config.presets import PRESETS, model_preset

    case = None
    if model is not None:
        preset = model in PRESETS and not Path(model).exists()
        config = model_preset(model) if preset else open_checkpoint(model).config
        case = ModelCase(config, precision, sequence_length, micro_batch_sequences)
    console = stderr_console()
    profile = measure(out.stem, processes, case, note=lambda line: console.print(line, soft_wrap=True))
    best = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in profile.peak_tflops.items())
    link = profile.intra_node
    emit(
        profile.model_dump(),
        json,
        f"{profile.devices} x {profile.memory_gbytes:.0f} GB, {profile.memory_gbytes_per_second:.3g} GB/s of memory\n"
        f"matmul at best: {best}\nlink: {link.gbytes_per_second:.3g} GB/s, {link.latency_us:.0f} us\n"
        f"written to {out}",
    )
    write_whole(out, profile_toml(profile))  # last: what took minutes to measure is shown even if it cannot be written


commands = {"train": train, "serve": serve, "kernels": kernels, "calibrate": calibrate}
