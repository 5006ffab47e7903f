"""`LLM` against transformers' generate, and against itself alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeforge.errors import RunError, UserError
from moeforge.serve import LLM, RequestOutput, SamplingParams

Saved = Callable[[str], Path]
PROMPTS = [[5, 6, 7], list(range(10, 40)), [200], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]
KINDS = ["llama", "mistral", "mixtral"]


def greedy(max_tokens: int = 24, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def llm(saved: Saved) -> LLM:
    return LLM(saved("llama"), dtype="fp32", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(saved: Saved, kind: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(saved(kind), dtype=torch.float32)
    expected = []
    for prompt in PROMPTS:
        out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        expected.append(out[0, len(prompt) :].tolist())
    ours = LLM(saved(kind), dtype="fp32", device="cpu")
    assert ids(ours.generate(PROMPTS, greedy())) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_requests_that_end_at_different_times_equals_each_alone(saved: Saved, kind: str) -> None:
    llm = LLM(saved(kind), dtype="fp32", device="cpu")
    params = [
        greedy(3),
        SamplingParams(temperature=1.5, seed=3, max_tokens=20),
        greedy(1),
        SamplingParams(temperature=0.8, seed=3, top_p=0.7, top_k=30, max_tokens=11),
    ]
    together = llm.generate(PROMPTS, params)
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert together == alone
    assert [len(tokens) for tokens in ids(together)] == [3, 20, 1, 11]
    assert [output.prompt_token_ids for output in together] == PROMPTS


def test_seeds_repeat_and_differ(llm: LLM) -> None:
    def draw(seed: int | None) -> list[list[int]]:
        return ids(llm.generate([PROMPTS[0]], SamplingParams(seed=seed, max_tokens=20, ignore_eos=True)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_text_is_encoded_and_decoded(llm: LLM) -> None:
    text, tokenizer = "The naïve café", llm.get_tokenizer()
    (output,) = llm.generate(text, greedy(12))
    assert output.prompt == text
    assert output.prompt_token_ids == tokenizer(text)["input_ids"]
    assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
    assert output == llm.generate([output.prompt_token_ids], greedy(12))[0].__class__(
        text, output.prompt_token_ids, output.outputs
    )


def test_chat_goes_through_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, greedy(5))
    assert output.prompt == "<user>hi\n<assistant>"
    assert llm.chat([conversation, conversation], greedy(5)) == [output, output]


def test_an_end_token_stops_unless_ignored(llm: LLM) -> None:
    free = llm.generate(PROMPTS[0], greedy(10, ignore_eos=True))[0].outputs[0]
    assert free.finish_reason == "length"
    end = free.token_ids[4]
    first = free.token_ids.index(end)
    stopped = llm.generate(PROMPTS[0], greedy(10, stop_token_ids=[end]))[0].outputs[0]
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: first + 1], "stop")


def test_the_models_own_end_tokens_stop(saved: Saved, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved("llama"), directory)
    free = LLM(directory, dtype="fp32", device="cpu").generate(PROMPTS[0], greedy(10, ignore_eos=True))[0].outputs[0]
    end = free.token_ids[3]
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": [257, {end}]}}')
    llm = LLM(directory, dtype="fp32", device="cpu")
    stopped = llm.generate(PROMPTS[0], greedy(10))[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert ids(llm.generate(PROMPTS[0], greedy(10, ignore_eos=True))) == [free.token_ids]


def test_each_step_shows_a_beginning_of_the_final_text(llm: LLM) -> None:
    seen: list[str] = []
    (final,) = llm.generate("stream", greedy(20), on_step=lambda outputs: seen.append(outputs[0].outputs[0].text))
    assert len(seen) == len(final.outputs[0].token_ids)
    assert all(final.outputs[0].text.startswith(text) for text in seen)
    assert seen[-1] == final.outputs[0].text


def test_generation_ends_at_max_model_len(saved: Saved) -> None:
    llm = LLM(saved("llama"), dtype="fp32", device="cpu", max_model_len=12)
    (output,) = llm.generate(PROMPTS[3], greedy(50, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 2
    assert output.outputs[0].finish_reason == "length"


def test_auto_keeps_the_stored_dtype(saved: Saved) -> None:
    assert LLM(saved("llama"), device="cpu").engine.runner._runner.cache.dtype == torch.float32
    assert LLM(saved("llama"), dtype="bf16", device="cpu").engine.runner._runner.cache.dtype == torch.bfloat16


def test_without_a_tokenizer_token_ids_still_work(saved: Saved, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved("llama"), directory, ignore=shutil.ignore_patterns("token*", "*.jinja"))
    with pytest.raises(UserError, match="no tokenizer.*skip_tokenizer_init"):
        LLM(directory, dtype="fp32", device="cpu")
    llm = LLM(directory, dtype="fp32", device="cpu", skip_tokenizer_init=True)
    (output,) = llm.generate([PROMPTS[0]], greedy(4))
    assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].text == ""
    for refused in (
        lambda: llm.generate("text", greedy()),
        lambda: llm.chat([{"role": "user", "content": "hi"}]),
        lambda: llm.generate(PROMPTS[0], greedy(stop=["x"])),
    ):
        with pytest.raises(UserError, match="no tokenizer"):
            refused()


def test_no_chat_template_is_one_clear_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 96, "prompt 1: has 96 tokens; max_model_len = 96 allows at most 95"),
        ([], "prompt 1: is empty"),
        ([264], "between 0 and 263"),
        ([-1], "between 0 and 263"),
    ],
)
def test_impossible_prompts_are_refused(llm: LLM, prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        llm.generate([[1, 2], prompt], greedy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_model_len": 97}, "max_model_len = 97.*96"),
        ({"dtype": "int3"}, "dtype = 'int3'.*auto, bf16, fp32"),
        ({"device": "toaster"}, "device = 'toaster'.*cpu"),
        ({"block_sise": 8}, "unexpected keyword argument 'block_sise'"),
        ({"block_size": 0}, "block_size = 0: must be a whole number"),
        ({"kv_cache_memory_bytes": 1000}, "max_model_len = 96.*room for 0 tokens"),
        ({"tensor_parallel_size": 97}, "tensor_parallel_size = 97.*96"),
        ({"plan": Path("absent.json")}, "absent.json: cannot read"),
    ],
)
def test_impossible_settings_are_refused(saved: Saved, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLM(saved("llama"), **arguments)  # type: ignore[arg-type]


def test_a_list_of_params_must_match(llm: LLM) -> None:
    with pytest.raises(UserError, match="1 for 2 prompts"):
        llm.generate(PROMPTS[:2], [greedy()])


def test_logits_that_are_not_finite_are_a_fault(saved: Saved) -> None:
    llm = LLM(saved("llama"), dtype="fp32", device="cpu")
    llm.engine.runner._runner.model.get_parameter("head.norm.weight").fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        llm.generate(PROMPTS[:1], greedy())


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []
