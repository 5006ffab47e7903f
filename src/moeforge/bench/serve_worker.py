"""One side of the serving benchmark in a process of its own: it loads a model once and then answers commands.

`python serve_worker.py JOB`, where JOB is {"side": ..., "model": directory, ...} as JSON. One line says that the model
is loaded: {"about": {...}}. Then every line {"prompts": token ids [B][S], "max_tokens": n, "mode": ...} on stdin is
answered by one on stdout. Runs under the peer's own interpreter, where there is no moeforge: the head of this file
imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import IO, Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int, str], Prompts]
"""Prompts, the number of new tokens and a mode to the new tokens of each prompt."""
Loaded = tuple[Generate, dict[str, Any]]


def moeforge(job: dict[str, Any]) -> Loaded:
    """Ours. job["engine"]: keyword arguments of `LLM`."""
    import torch

    from moeforge import __version__
    from moeforge.serve import LLM, SamplingParams

    llm = LLM(job["model"], **job["engine"])

    def generate(prompts: Prompts, max_tokens: int, mode: str) -> Prompts:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    return generate, {"version": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


def hf(job: dict[str, Any]) -> Loaded:
    """transformers' `generate`; mode: one of its expert implementations."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None

    def generate(prompts: Prompts, max_tokens: int, mode: str) -> Prompts:
        model.set_experts_implementation(mode)
        tokens_BS = torch.tensor(prompts)
        mask_BS = torch.ones_like(tokens_BS)
        with torch.inference_mode():
            made = model.generate(tokens_BS, attention_mask=mask_BS, max_new_tokens=max_tokens, do_sample=False)
        return made[:, tokens_BS.shape[1] :].tolist()

    return generate, {
        "version": transformers.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def vllm(job: dict[str, Any]) -> Loaded:
    """vLLM's CPU build. job["engine"]: keyword arguments of its `LLM`."""
    import torch

    package: Any = importlib.import_module("vllm")  # not installed where types are checked
    llm = package.LLM(job["model"], **job["engine"])

    def generate(prompts: Prompts, max_tokens: int, mode: str) -> Prompts:
        params = package.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(output.outputs[0].token_ids) for output in llm.generate(asked, params, use_tqdm=False)]

    return generate, {
        "version": package.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


SIDES: dict[str, Callable[[dict[str, Any]], Loaded]] = {"moeforge": moeforge, "hf": hf, "vllm": vllm}


def answer(generate: Generate, command: dict[str, Any]) -> dict[str, Any]:
    """Run one command: seconds from prompts in to token ids out, and the first new token of each prompt."""
    count = command["max_tokens"]
    start = time.perf_counter()
    made = generate(command["prompts"], count, command["mode"])
    seconds = time.perf_counter() - start
    if len(made) != len(command["prompts"]) or any(len(tokens) != count for tokens in made):
        raise RuntimeError(f"asked for {count} tokens each, got {[len(tokens) for tokens in made]}")
    return {"seconds": seconds, "first_tokens": [tokens[0] for tokens in made]}


def serve(job: dict[str, Any], commands: IO[str], answers: IO[str]) -> None:
    """Load, then answer every line of `commands` until it ends."""
    generate, about = SIDES[job["side"]](job)
    print(json.dumps({"about": about}), file=answers, flush=True)
    for line in commands:
        try:
            reply = answer(generate, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    # Libraries print to stdout as they like: it becomes stderr, and only answers go where it pointed.
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), sys.stdin, private)
