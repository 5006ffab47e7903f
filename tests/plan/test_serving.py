"""The serving planner against the arithmetic of the reference notes, real parameter lists, and properties."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.config.gpus import load_gpus
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import PRESETS, model_preset
from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.plan import serving_claims
from moeforge.plan.serving import ONE_SCALE_EACH, ServingPlan, ServingRequest, plan_serving, pooled_blocks
from moeforge.plan.serving_advice import remedies
from moeforge.plan.serving_memory import gate_bytes, storage, weight_bytes
from moeforge.plan.serving_shards import padded_shards
from moeforge.plan.serving_summary import comparison, figures
from moeforge.plan.serving_time import experts_touched

SKYWORK = model_preset("skywork-moe")


def request(model: ModelConfig = SKYWORK, gpus: str = "8x4090", weights: str = "fp8", **engine) -> ServingRequest:  # type: ignore[no-untyped-def]
    context = engine.pop("context", None)
    cards, dtype = load_gpus(gpus), "bf16" if weights == "fp8" else weights
    model = dataclasses.replace(model, quantization=ONE_SCALE_EACH if weights == "fp8" else None)
    return ServingRequest(model, cards, EngineConfig(tensor_parallel_size=len(cards), **engine), dtype, context)  # type: ignore[arg-type]


def plan(*args, **kwargs) -> ServingPlan:  # type: ignore[no-untyped-def]
    return plan_serving(request(*args, **kwargs))


def within(found: float, expected: float, share: float) -> bool:
    return abs(found / expected - 1) <= share


def test_skywork_moe_on_eight_4090_is_the_pooled_optimum() -> None:
    """Notes, section 5: 39,622 rotated, 35,199 unrotated or padded, 79,245 with FP8 KV; ours counts norms, routers
    in float32, scales and whole pages: 0.3 % less."""
    rows = {row["layout"]: row for row in comparison(plan())}
    own, same, padded, bound = rows.values()
    assert list(rows)[2] == "even shards, padded to 40 heads"
    assert within(own["kv_tokens"], 39_622, 0.003) and own["kv_tokens"] == bound["kv_tokens"] == 39_536
    assert within(same["kv_tokens"], 35_199, 0.003) and same["kv_tokens"] == padded["kv_tokens"] == 35_120
    assert within(own["kv_tokens_fp8"], 79_245, 0.003) and own["kv_tokens_fp8"] == 79_072
    assert plan(kv_cache_dtype="fp8").kv_tokens == 79_072


def test_the_bytes_of_skywork_moe_by_hand() -> None:
    attention = 52 * 4 * 4608 * 4.5 * 128
    experts = 52 * 16 * 3 * 4608 * 1536
    scales = 52 * (4.5 * 3 * 128 + 4608 + 16 * (2 * 1536 + 4608)) / 16 * 4
    vocabulary, norms, routers = 2 * 8192 * 4608 * 2, (2 * 52 + 1) * 4608 * 2, 52 * 16 * 4608 * 4
    rank = plan().memory[0]
    assert rank.weight_bytes == attention + experts + scales + vocabulary + norms + routers == 18_387_461_568
    assert rank.usable_bytes == pytest.approx(0.95 * 23.65 * 2**30 - 1e9, rel=1e-4)
    assert rank.kv_token_bytes == 2 * 128 * 2 * 234 == 119_808
    assert rank.num_blocks == (rank.usable_bytes - rank.weight_bytes) // (16 * 119_808)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("tp", [1, 3, 8])
def test_weights_are_those_of_the_parameter_list(name: str, tp: int) -> None:
    """What the engine will load, part by part; its routers are widened to float32."""
    from moeforge.parallel.parameters import parameter_parts

    model = model_preset(name)
    model = dataclasses.replace(model, num_layers=3, qkv_bias=tp == 3, output_bias=tp == 8)
    made = plan(model, f"{tp}xh200", "bf16", max_model_len=16)
    stored = storage("bf16", "auto")
    routers = len(model.moe_layers) * gate_bytes(model, stored) // 2
    for rank, memory in enumerate(made.memory):
        parts = parameter_parts(model, made.layout, 0, rank, rank).values()
        assert memory.weight_bytes - routers == 2 * sum(part.numel for part in parts)


MODEL = ModelConfig(
    vocab_size=1000, hidden_size=64, num_layers=6, num_heads=10, num_kv_heads=5, head_dim=16, ffn_size=256,
    max_positions=512, moe=MoEConfig(4, 2, 128, layer_frequency=2),
)  # fmt: skip


@st.composite
def small(draw) -> ServingRequest:  # type: ignore[no-untyped-def]
    groups = draw(st.integers(1, 9))
    frequency = draw(st.integers(0, 2))
    model = dataclasses.replace(
        MODEL, num_layers=draw(st.integers(1, 8)), num_kv_heads=groups, num_heads=groups * draw(st.integers(1, 3)),
        ffn_size=draw(st.integers(16, 300)), tie_embeddings=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, 64])),
        moe=MoEConfig(4, 2, 128, layer_frequency=frequency) if frequency else None,
    )  # fmt: skip
    gpus = draw(st.sampled_from(["1x4090", "2x4090", "3x3090", "7x4090", "2x4090+1xh200", "1x3090+4x4090", "9xcpu"]))
    weights = draw(st.sampled_from(["fp8", "bf16", "fp32"]))
    return request(model, gpus, weights, kv_cache_dtype=draw(st.sampled_from(["auto", "fp8"])))


@settings(max_examples=80)
@given(small())
def test_every_rank_has_room_for_what_is_promised(asked: ServingRequest) -> None:
    made = plan_serving(asked)
    made.layout.check(asked.model, len(asked.gpus))
    for memory in made.memory:
        assert made.kv_tokens * memory.kv_token_bytes + memory.weight_bytes <= memory.usable_bytes
    one_more = [m for m in made.memory if (made.num_blocks + 1) * 16 * m.kv_token_bytes > m.free_bytes]
    assert one_more  # somewhere there is no room for another page
    assert made.num_blocks <= pooled_blocks(made.memory, 16)
    assert 0 < made.attention_efficiency <= 1
    point = made.step(8)
    assert all(0 < busy <= point.compute * (1 + 1e-9) for busy in point.busy)
    assert (point.all_reduce == 0) == (len(asked.gpus) == 1)
    result = figures(made)
    assert result["fits"] and result["curve"][-1]["batch"] == made.most_sequences
    rates = [each["tokens_per_second"] for each in result["curve"]]
    assert rates == sorted(rates)


def test_uneven_memory_is_shared_so_that_all_run_out_together() -> None:
    made = plan(gpus="4x4090+4x3090")
    assert within(made.kv_tokens, pooled_blocks(made.memory, 16) * 16, 0.003)
    assert made.kv_tokens > plan().kv_tokens
    mixed = plan(gpus="2xh200+1x4090", max_model_len=4096)
    heads = [sum(shard.kv_groups) / 52 for shard in mixed.shards]
    assert heads[0] == pytest.approx(36 * 141.5 / (2 * 141.5 + 23.12), abs=0.1) and heads[2] < 3
    assert within(mixed.kv_tokens, pooled_blocks(mixed.memory, 16) * 16, 0.02)
    even = plan(gpus="2xh200+1x4090", max_model_len=4096, gpu_split=(1, 1, 1))
    assert even.kv_tokens == 0 and not even.fits


def test_a_split_is_taken_as_proportions() -> None:
    model = MODEL
    assert plan(model, "2x4090", gpu_split=(48, 24)).layout == plan(model, "2x4090", gpu_split=(2, 1)).layout
    nothing = plan(model, "2x4090", gpu_split=(1, 0))
    assert nothing.memory[1].num_blocks is None and nothing.memory[1].kv_token_bytes == 0
    assert nothing.kv_tokens == plan(model, "1x4090").kv_tokens
    assert figures(nothing)["ranks"][1]["kv_tokens"] is None


def test_a_slow_card_makes_the_others_wait() -> None:
    ranks = figures(plan(gpus="4x4090+4x3090"))["ranks"]
    assert {rank["gpu"] for rank in ranks if rank["wait_ms"] > 2} == {"4090"}
    assert all(rank["wait_ms"] < 1 for rank in ranks if rank["gpu"] == "3090")


def test_step_times_are_the_notes() -> None:
    """Notes, section 5, 12 GB/s: batch, memory ms, all-reduce ms, step ms, tokens/s."""
    made = plan(context=256)
    for batch, compute, reduce, step, rate in (
        (1, 3.4, 4.6, 8.0, 125), (16, 19.6, None, 26.5, 605), (32, 22.4, 8.9, 31.6, 1011),
        (64, 24.0, 13.4, 38.0, 1683), (96, 25.3, None, 44.1, 2176), (128, 26.5, 22.5, 50.2, 2549),
    ):  # fmt: skip
        found = made.step(batch)
        assert found.compute * 1e3 == pytest.approx(compute, abs=0.06)
        assert reduce is None or found.all_reduce * 1e3 == pytest.approx(reduce, abs=0.06)
        assert found.total * 1e3 == pytest.approx(step, rel=0.006)
        assert batch / found.total == pytest.approx(rate, rel=0.006)
    assert [round(experts_touched(SKYWORK, batch), 1) for batch in (8, 16, 32, 64)] == [10.5, 14.1, 15.8, 16.0]


def test_long_contexts_are_bound_by_reading_the_cache() -> None:
    near, far = plan(context=256).step(32), plan(context=1024).step(32)
    read = 32 * (1024 - 256) * 5 * 2 * 128 * 2 * 52
    assert far.attention - near.attention == pytest.approx(read / 857e9)
    windowed = dataclasses.replace(SKYWORK, sliding_window=256)
    assert plan(windowed, context=1024).step(32).attention == pytest.approx(near.attention)
    assert plan(windowed, context=1024).kv_tokens == plan().kv_tokens


def test_large_batches_are_bound_by_arithmetic() -> None:
    """Notes: the FLOP floor of 128 sequences is 4.4 ms; at 10,000 it is far above what reading takes."""
    made = plan(context=1)
    flops = 2 * 10_000 * 2 * 3 * 4608 * 1536 + 2 * 10_000 * 4608 * 16
    assert made.step(10_000).ffn == pytest.approx(52 * flops / 150e12)


def test_efficiency_is_the_mean_over_the_most() -> None:
    assert plan().attention_efficiency == pytest.approx(4.5 / 5)
    assert plan(gpus="6x4090").attention_efficiency == 1
    assert plan(model_preset("smollm2-135m"), "7x4090").attention_efficiency == pytest.approx(3 / 7)


def test_what_would_make_it_fit() -> None:
    assert [r.options for r in remedies(request(weights="bf16"))] == ["--weights fp8", "--gpus 14x4090"]
    for remedy in remedies(request(weights="bf16")):
        again = dict(zip(*[iter(remedy.options.split())] * 2, strict=True))
        fitting = plan(weights=again.get("--weights", "bf16"), gpus=again.get("--gpus", "8x4090"))
        assert fitting.fits and fitting.kv_tokens == remedy.kv_tokens
    assert not plan(gpus="13x4090", weights="bf16").fits  # so 14 are the fewest
    one = remedies(request(gpus="1xh200"))
    assert [r.options for r in one] == ["--gpu-memory-utilization 1 --max-model-len 2096", "--gpus 2xh200"]
    assert plan(gpus="1xh200", gpu_memory_utilization=1.0, max_model_len=2096).fits
    llama = request(model_preset("llama-3.1-8b"), "1x4090", "bf16")
    assert any(r.options.startswith("--max-model-len ") for r in remedies(llama))
    split = [r.options for r in remedies(request(gpu_split=(9, 1, 1, 1, 1, 1, 1, 1)))]
    assert split[0] == "no --gpu-split" and len(split) == 2


def test_hopeless_requests_are_answered_at_once() -> None:
    narrow = dataclasses.replace(MODEL, ffn_size=3, hidden_size=2**25, moe=None)
    assert [r.options for r in remedies(request(narrow, "2x4090", "fp32"))] == []


def test_lengths_beyond_the_model_are_refused() -> None:
    with pytest.raises(UserError, match="max_model_len = 8193: must be at most 8192, the model's positions"):
        plan(max_model_len=8193)
    with pytest.raises(UserError, match=r"context = 257: must be 1 to 256, the longest sequence \(max_model_len\)"):
        plan(max_model_len=256, context=257)
    assert plan(max_model_len=100).request.live_tokens == 100
    with pytest.raises(UserError, match="matmul.fp64: missing, the model computes in it"):
        plan(MODEL, "1x4090", "fp64").step(1)
    with pytest.raises(UserError, match="tensor_parallel_size = 200: must be at most 128"):
        plan(MODEL, "200x4090")


def test_padding_fills_up_every_dimension() -> None:
    made = plan(gpus="7x4090")
    for shard in padded_shards(SKYWORK, 7):
        assert shard.kv_groups == (6,) * 52 and shard.columns == (1760,) * 52 and shard.vocab_rows == 9362
        padded = weight_bytes(made.request.model, shard, made.request.stored)
        assert padded > max(memory.weight_bytes for memory in made.memory)


def test_where_2200_tokens_a_second_come_out() -> None:
    """Notes, section 5: B = 74 and 98 (99 here: routers and the gather's latency are counted), 136 with 10 ms of
    host time, and never within memory over 6 GB/s."""
    fast, middle, slow = serving_claims.BUSES
    assert serving_claims.smallest_batch(serving_claims.rotated(fast)) == 74
    assert serving_claims.smallest_batch(serving_claims.rotated(middle)) == 99
    assert serving_claims.smallest_batch(serving_claims.rotated(middle, 0.010)) == 136
    assert serving_claims.smallest_batch(serving_claims.rotated(slow)) is None
    for bus, rates in ((fast, (2001, 3125)), (slow, (1291, 1793))):
        found = [serving_claims.rotated(bus).rate(batch, 256) for batch in (64, 128)]
        assert found == pytest.approx(rates, rel=0.002)
    longest = serving_claims.longest_context(serving_claims.rotated(middle))
    assert longest is not None and longest > 256


def test_the_even_baseline_is_faster_only_over_the_slow_bus() -> None:
    fast, middle, slow = serving_claims.BUSES
    ours, even = (made(middle) for made in (serving_claims.rotated, serving_claims.pipelined))
    assert within(even.kv_tokens, ours.kv_tokens, 0.003)
    assert serving_claims.smallest_batch(even) == 136 and even.rate(128, 256) == pytest.approx(2260, rel=0.08)
    for bus, wins in ((fast, True), (middle, True), (slow, False)):
        ours, even = serving_claims.rotated(bus), serving_claims.pipelined(bus)
        full = ours.most(256)
        assert (ours.rate(full, 256) > even.rate(full, 256)) is wins
