"""The engine on models of every family: against transformers, over ranks, with few pages, bit for bit, as planned."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeforge.checkpoint import open_checkpoint, save_model
from moeforge.errors import UserError
from moeforge.layout import serving_layout
from moeforge.serve import LLM, SamplingParams, build
from moeforge.serve.sampling_params import StructuredOutputsParams

from .families import FAMILIES, family, random_model
from .recording import LOGITS, MARGIN, Answer, answers, greedy, require_same, worker_processes

Saved = Callable[[str], Path]
PROMPTS = [[5, 6, 7], list(range(10, 36)), [20], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [5, 6, 7, 8]]
SMALL = {
    "dtype": "fp32",
    "device": "cpu",
    "skip_tokenizer_init": True,
    "block_size": 4,
    "max_num_batched_tokens": 7,
    "max_num_seqs": 3,
}


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert not worker_processes()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The directory of a random model of a family, float32, as we write it."""
    directory = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        path = directory / name.replace(", ", "-")
        if not path.exists():
            # transformers wants the heads' width to be the model's in Llama
            save_model(random_model(dataclasses.replace(family(name), hidden_size=48), torch.float32), path)
        return path

    return make


def of(model: Path, **settings: Any) -> LLM:
    return LLM(model, **(SMALL | settings))


def answers_of(model: Path, **settings: Any) -> list[Answer]:
    llm = of(model, **settings)
    try:
        return answers(llm, PROMPTS)
    finally:
        llm.close()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "ours"])
def test_logits_are_those_of_transformers(made: Saved, saved: Saved, name: str) -> None:
    model = saved(name) if name == "olmoe" else made(name)  # which we do not write in its own form
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    for answer in answers_of(model):
        with torch.inference_mode():
            logits = reference(torch.tensor([answer.prompt + answer.tokens])).logits[0].double()
        theirs = logits[len(answer.prompt) - 1 : -1]
        torch.testing.assert_close(answer.logits_NV, theirs, rtol=LOGITS, atol=LOGITS)
        best = theirs.topk(2).values
        clear = best[:, 0] - best[:, 1] > MARGIN
        assert theirs.argmax(-1)[clear].tolist() == torch.tensor(answer.tokens)[clear].tolist()


RANKS = [(name, tp) for name in FAMILIES for tp in (2, 3, 5, 7)]
QUICK = [("mixtral", 2), ("ours", 3)]


@pytest.mark.parametrize(
    ("name", "tp"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=f"{case[0]}-{case[1]}") for case in RANKS],
)
def test_any_number_of_processes_answers_as_one(made: Saved, name: str, tp: int) -> None:
    require_same(answers_of(made(name), tensor_parallel_size=tp), answers_of(made(name)))


# Few pages, few places, few tokens a step.


def few_pages(model: Path, caching: bool, **settings: Any) -> LLM:
    """Room for 15 pages of 4: not two of the longest sequences, of 48."""
    config = open_checkpoint(model).config
    itemsize = 2 if settings.get("dtype") == "bf16" else 4
    page = 2 * 4 * config.head_dim * config.num_kv_heads * config.num_layers * itemsize
    return of(
        model,
        **{"max_model_len": 48, "kv_cache_memory_bytes": 16 * page, "enable_prefix_caching": caching} | settings,
    )


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "ours"])
def test_with_few_pages_everyone_gets_what_it_gets_alone(made: Saved, name: str, caching: bool) -> None:
    llm = few_pages(made(name), caching)
    together = answers(llm, PROMPTS, greedy(20))
    assert llm.engine.scheduler.preemptions > 0
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.kv_cache_usage == 0
    roomy = of(made(name), enable_prefix_caching=False)
    require_same(together, [answer for prompt in PROMPTS for answer in answers(roomy, [prompt], greedy(20))])
    assert roomy.engine.scheduler.preemptions == 0


def test_a_known_beginning_is_not_computed_again(made: Saved) -> None:
    beginning = list(range(3, 27))
    prompts = [[*beginning, 1], [*beginning, 2, 3], beginning, [0, *beginning]]
    llm = of(made("mixtral"), max_num_batched_tokens=64)
    scheduler = llm.engine.scheduler
    found = []
    for prompt in prompts:
        found += answers(llm, [prompt])
    assert (scheduler.prefix_queries_tokens, scheduler.prefix_hits_tokens) == (100, 24 + 20)
    found += answers(llm, prompts)
    without = of(made("mixtral"), max_num_batched_tokens=64, enable_prefix_caching=False)
    require_same(found, answers(without, prompts) * 2)
    assert without.engine.scheduler.prefix_hits_tokens == 0


def test_nothing_is_shared_over_salts(made: Saved) -> None:
    engine = of(made("llama")).engine
    prompt = list(range(3, 27))

    def hits(salt: bytes) -> int:
        before = engine.scheduler.prefix_hits_tokens
        for request in engine.requests("x", None, prompt, greedy(2), salt):
            engine.add(request)
        while engine.has_work:
            engine.step()
        return engine.scheduler.prefix_hits_tokens - before

    assert [hits(b"one"), hits(b"two"), hits(b""), hits(b"one"), hits(b"two")] == [0, 0, 0, 20, 20]


def test_a_failed_step_leaves_an_engine_that_can_go_on(made: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = of(made("llama"))
    expected = llm.generate(PROMPTS, greedy())
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "sampler", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate(PROMPTS, greedy())
    assert not llm.engine.has_work
    llm.engine.scheduler.check()
    assert llm.generate(PROMPTS, greedy()) == expected


# Draws.


def drawn(**more: Any) -> SamplingParams:
    return SamplingParams(**({"seed": 5, "max_tokens": 16, "ignore_eos": True, "logprobs": 3} | more))


DRAWN = [drawn(), drawn(seed=6, temperature=1.7), drawn(temperature=0), drawn(top_p=0.8), drawn(seed=8, max_tokens=9)]


def test_a_seed_gives_the_same_tokens_in_any_company(made: Saved) -> None:
    llm = of(made("mixtral"))
    together = llm.generate(PROMPTS, DRAWN)
    for output, prompt, params in zip(together, PROMPTS, DRAWN, strict=True):
        (alone,) = llm.generate([prompt], params)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_continuations_of_one_prompt_differ_and_repeat(made: Saved) -> None:
    llm = of(made("llama"))
    (four,) = llm.generate([PROMPTS[0]], drawn(n=4))
    tokens = [output.token_ids for output in four.outputs]
    assert [output.index for output in four.outputs] == [0, 1, 2, 3]
    assert len({tuple(one) for one in tokens}) == 4
    again = llm.generate([PROMPTS[1], PROMPTS[0]], [greedy(), drawn(n=4)])[1]
    assert [output.token_ids for output in again.outputs] == tokens
    assert llm.generate([PROMPTS[0]], drawn())[0].outputs[0].token_ids == tokens[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_deterministic_means_the_same_bits_whatever_happens(made: Saved, dtype: str, tp: int) -> None:
    """Alone, in company, preempted, from the prefix cache or computed in other chunks."""
    settings = {"dtype": dtype, "deterministic": True, "tensor_parallel_size": tp}
    roomy = of(made("mixtral"), enable_prefix_caching=False, max_num_batched_tokens=64, **settings)
    try:
        alone = [roomy.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, DRAWN, strict=True)]
        assert roomy.generate(PROMPTS, DRAWN) == alone
    finally:
        roomy.close()
    for caching in (False, True):
        narrow = few_pages(made("mixtral"), caching, max_num_seqs=8, **settings)
        try:
            assert narrow.generate(PROMPTS, DRAWN) == alone
            if tp == 1:  # two ranks hold fewer groups each, so more pages
                assert narrow.engine.scheduler.preemptions > 0
            assert narrow.generate(PROMPTS, DRAWN) == alone
            assert (narrow.engine.scheduler.prefix_hits_tokens > 0) == caching
        finally:
            narrow.close()


# Other things an engine can do.


def test_a_schema_is_followed(saved: Saved) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "bc"]}, "yes": {"type": "boolean"}, "n": {"enum": [1, 22]}},
        "required": ["kind", "yes", "n"],
        "additionalProperties": False,
    }
    params = SamplingParams(seed=4, max_tokens=80, structured_outputs=StructuredOutputsParams(json=schema))
    llm = LLM(saved("llama"), dtype="fp32", device="cpu", block_size=4)
    outputs = llm.generate(["give", "a thing"], [params, params])
    for output in outputs:
        data = json.loads(output.outputs[0].text)
        assert sorted(data) == ["kind", "n", "yes"]
        assert data["kind"] in ("a", "bc") and data["n"] in (1, 22) and isinstance(data["yes"], bool)
        assert output.outputs[0].finish_reason == "stop"
    assert len(llm.generate("free", greedy(4))[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_fp8_pages_change_little(made: Saved, name: str) -> None:
    exact, small = of(made(name)), of(made(name), kv_cache_dtype="fp8")
    found = answers(small, PROMPTS)
    texts = [answer.prompt + answer.tokens[:step] for answer in found for step in range(len(answer.tokens))]
    expected = answers(exact, texts, greedy(1))
    logits = torch.cat([answer.logits_NV for answer in found])
    similarity = torch.cosine_similarity(logits, torch.cat([answer.logits_NV for answer in expected]))
    same = logits.argmax(-1) == torch.tensor([answer.tokens[0] for answer in expected])
    assert similarity.median() > 0.97  # not the least: a token that goes to another expert has quite other logits
    assert same.float().mean() > 0.5
    assert not torch.equal(logits[-1], expected[-1].logits_NV[0])


def test_a_plan_is_followed(made: Saved, tmp_path: Path) -> None:
    model = made("olmoe")
    layout = serving_layout(open_checkpoint(model).config, 2, (3, 1))
    layout.write(tmp_path / "plan.json")
    llm = of(model, plan=tmp_path / "plan.json")
    try:
        assert llm.engine.layout == layout
        assert len(worker_processes()) == 1
        found = answers(llm, PROMPTS)
    finally:
        llm.close()
    require_same(found, answers_of(model))


def test_gpu_split_says_who_holds_how_much(made: Saved) -> None:
    model = made("llama")
    llm = of(model, tensor_parallel_size=2, gpu_split=(1, 2))
    try:
        assert llm.engine.layout == serving_layout(open_checkpoint(model).config, 2, (1, 2))
        require_same(answers(llm, PROMPTS), answers_of(model))
    finally:
        llm.close()


def test_what_cannot_be_is_one_clear_error(made: Saved, tmp_path: Path) -> None:
    serving_layout(open_checkpoint(made("llama")).config, 2).write(tmp_path / "llama.json")
    for settings, message in (
        ({"plan": tmp_path / "llama.json"}, "the plan was made for another model"),
        ({"plan": tmp_path / "llama.json", "gpu_split": (1,)}, "give one of both"),
        ({"tensor_parallel_size": 49}, "tensor_parallel_size = 49: must be at most 48"),
        ({"tensor_parallel_size": 2, "gpu_split": (1, 2, 3)}, "gpu_split = 1,2,3: must have one number for each of"),
        ({"kv_cache_memory_bytes": 10_000}, "max_model_len = 64: .* room for 12 tokens .*at most 12"),
        ({"max_model_len": 65}, "max_model_len = 65"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            of(made("mixtral"), **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="tensor_parallel_size = 3: the plan is for 2 ranks"):
        of(made("llama"), plan=tmp_path / "llama.json", tensor_parallel_size=3)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(
    made: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "free_bytes", lambda _: 10_000)
    monkeypatch.setattr(build, "load_rank", lambda *_: pytest.fail("was read"))
    for tp in (1, 2):
        with pytest.raises(UserError, match="weights need .* GB in all in float32, and .* GB are free"):
            of(made("mixtral"), tensor_parallel_size=tp)


def test_another_ranks_refusal_ends_all(made: Saved) -> None:
    """Rank 1 holds all keys, and has no memory for them; rank 0 wants none."""
    with pytest.raises(UserError, match="rank 1: max_model_len = 64"):
        of(made("llama"), tensor_parallel_size=2, gpu_split=(1, 100), kv_cache_memory_bytes=10_000)


def test_dummy_weights_need_a_configuration_only(made: Saved, tmp_path: Path) -> None:
    shutil.copy(made("ours") / "config.json", tmp_path)
    llm = of(tmp_path, load_format="dummy")
    (output,) = llm.generate([PROMPTS[0]], greedy(5))
    assert len(output.outputs[0].token_ids) == 5 and output.outputs[0].text == ""
    with pytest.raises(UserError, match="no tokenizer was loaded .*give token ids"):
        llm.generate("text")
    with pytest.raises(UserError, match="no weights"):
        of(tmp_path)
    with pytest.raises(UserError, match="no tokenizer; with skip_tokenizer_init"):
        of(tmp_path, load_format="dummy", skip_tokenizer_init=False)


@pytest.mark.slow
def test_dummy_weights_of_a_preset() -> None:
    llm = of(Path("smollm2-135m"), load_format="dummy", dtype="auto", max_model_len=64)
    (output,) = llm.generate([[1, 2, 3]], greedy(3))
    assert len(output.outputs[0].token_ids) == 3
