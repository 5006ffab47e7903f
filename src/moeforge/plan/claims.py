"""The headline claims of the Skywork-MoE report that arithmetic or simulation can reach, derived again.

Each claim has our figures, the convention they rest on, a verdict, and the command that gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moeforge.config.clusters import load_hardware
from moeforge.config.presets import model_preset
from moeforge.plan import serving_claims
from moeforge.plan.arrangement import Arrangement
from moeforge.plan.cost import model_flops_per_token
from moeforge.plan.exact import best_1f1b
from moeforge.plan.planner import Plan, make_plan, make_problem, plan_of_split, uniform_plan
from moeforge.plan.search import work_of
from moeforge.plan.simulator import simulate
from moeforge.plan.times import UnitTime
from moeforge.plan.workload import Workload

GB = 1e9


@dataclass(frozen=True)
class Claim:
    """`figures` are (what, value) pairs for a reader."""

    claim: str
    figures: tuple[tuple[str, str], ...]
    convention: str
    verdict: str
    command: str


def all_claims() -> tuple[Claim, ...]:
    """In the order of SKYWORK section 6, the pipeline's in between."""
    return (
        parameters(),
        smaller_than_deepseek_v2(),
        cheaper_than_dense_70b(),
        example_of_24_layers(),
        *production_pipeline(),
        reported_utilisation(),
        fp8_weights_on_4090(),
        output_rate_on_4090(),
    )


def parameters() -> Claim:
    model = model_preset("skywork-moe")
    total, active = model.parameters(), model.parameters(active=True)
    without = active - model.vocab_size * model.hidden_size
    return Claim(
        "146 B parameters, 22 B active",
        (
            ("total", f"{total / 1e9:.2f} B"),
            ("active", f"{active / 1e9:.2f} B"),
            ("active without the input embedding", f"{without / 1e9:.2f} B"),
        ),
        "all weights of the released shape; active: 2 of 16 experts a layer",
        "holds",
        "moeforge inspect skywork-moe",
    )


def smaller_than_deepseek_v2() -> Claim:
    total = model_preset("skywork-moe").parameters()
    return Claim(
        "a third smaller than DeepSeek-V2 (236 B)",
        (("1 - 146.4 / 236", f"{1 - total / 236e9:.1%}"),),
        "total parameters; 236 B as DeepSeek-V2's authors state",
        "holds in total parameters; per token DeepSeek-V2 uses 21 B, about as many",
        "moeforge claims",
    )


def cheaper_than_dense_70b() -> Claim:
    model = model_preset("skywork-moe")
    head = model.vocab_size * model.hidden_size
    active, dense = model.parameters(active=True) - head, 70e9
    layer = 3 * model.hidden_size * model.ffn_size
    other = active - 2 * layer * model.num_layers

    def advantage(batch: int) -> float:
        touched = 16 * (1 - (1 - 2 / 16) ** batch)
        return dense / (other + touched * layer * model.num_layers)

    even = next(batch for batch in range(1, 100) if advantage(batch) < 1)
    rows = [(f"weights read in a decode step of {b}, dense over MoE", f"{advantage(b):.2f}x") for b in (1, 4, 16, 64)]
    return Claim(
        "inference about 3x cheaper than a dense 70 B model",
        (("FLOPs a token, 70 B over active", f"{dense / active:.2f}x"), *rows),
        "2 FLOPs for each weight that a token meets; decode: weights read once a step, experts chosen evenly",
        "holds in FLOPs (prefill, batches large enough to be bound by arithmetic); decoding is bound by weights read: "
        f"there it holds for one sequence, and from {even} on the MoE reads more, since most experts are touched",
        "moeforge claims",
    )


def example_of_24_layers() -> Claim:
    """24 layers on 4 or 5 stages; times in forwards of one layer, backward twice as long, the head like the report's
    own (0.71 of a layer by FLOPs)."""
    head = 0.71
    figures = []
    for m in (16, 64, 128):
        four = _step([6, 6, 6, 6], head, m)
        five = _step([5, 5, 5, 5, 4], head, m)
        best = min((_step(split, head, m), split) for split in _splits(24, 4))
        ideal = 3 * (24 + head) * m
        waits4, waits5 = 4 * four - ideal, 5 * five - ideal
        figures += [
            (f"m = {m}: step, 4 against 5 stages as printed", f"{four / five - 1:+.1%} (with 5/4 of the devices)"),
            (f"m = {m}: device time a sample", f"{4 * four / (5 * five) - 1:+.1%}"),
            (f"m = {m}: device time lost to bubbles", f"{waits5 / waits4 - 1:+.1%}"),
            (f"m = {m}: best split of 4 stages", f"{best[1]}, {four / best[0] - 1:+.1%} against [6, 6, 6, 6]"),
        ]
    return Claim(
        "24 layers as [5, 5, 5, 5, 4] instead of [6, 6, 6, 6] cut bubble time by up to 10 %",
        tuple(figures),
        "1F1B, m micro-batches, forward : backward = 1 : 2, head = 0.71 layers, no transfers; simulated",
        "not at equal device count: the printed comparison has 5 stages against 4. Per device the fifth stage gains "
        "a few per cent, from the head's work on the last stage; on 4 stages whole layers leave nothing to gain",
        "moeforge claims",
    )


def _step(layers: Sequence[int], head: float, micro_batches: int) -> float:
    work = [float(n) for n in layers]
    work[-1] += head
    stages = [UnitTime(forward=each, backward=2 * each) for each in work]
    return simulate("1f1b", len(work), micro_batches, stages).step_seconds


def _splits(layers: int, stages: int) -> list[list[int]]:
    if stages == 1:
        return [[layers]]
    return [[n, *rest] for n in range(1, layers - stages + 2) for rest in _splits(layers - n, stages - 1)]


CASES = {
    "8,192 tokens, micro-batches of 1": (8192, 1, 1536),
    "8,192 tokens, micro-batches of 2": (8192, 2, 3072),
    "16,384 tokens, micro-batches of 1": (16384, 1, 1536),
    "32,768 tokens, micro-batches of 1": (32768, 1, 1536),
}


def production_pipeline() -> tuple[Claim, ...]:
    """52 layers on 12 stages of the production cluster, 48 micro-batches, with and without memory pressure."""
    figures: list[tuple[str, str]] = []
    for name, (length, micro, batch) in CASES.items():
        rows = pipeline_gains(length, micro, batch)
        figures.append((f"{name}: uniform step", rows.pop("uniform")))
        figures += [(f"{name}: {what}", value) for what, value in rows.items()]
    return (
        Claim(
            "non-uniform stages and recomputation by stage: about +10 % throughput (52 layers on 12 stages)",
            tuple(figures),
            "192x8-a800, pp 12, dp 32, tp 4, EDP, 1F1B, 48 micro-batches, bf16, ZeRO-1; uniform: 5, 5, 5, 5, 4, ... "
            "and the smallest one recompute count that fits; splits proven optimal; simulated on assumed rates",
            "holds, and more, where memory is short; where it is not, whole layers gain nothing (some stage has 5 of "
            "them in any split), and boundaries inside layers a third of it",
            "moeforge plan train skywork-moe --cluster 192x8-a800 --set parallel.pp=12 --set parallel.tp=4 "
            "--set parallel.expert_mode=edp --set parallel.schedule=1f1b",
        ),
    )


def pipeline_gains(sequence_length: int, micro_batch: int, batch: int) -> dict[str, str]:
    """The uniform step, and what each freedom gains over it in throughput."""
    hardware = load_hardware("192x8-a800")
    arrangement = Arrangement(12, 32, 4, 4, 1, "1f1b", 1, micro_batch)
    model = model_preset("skywork-moe")
    work = work_of(Workload(model, "bf16", sequence_length, micro_batch, batch), arrangement)
    uniform = uniform_plan(hardware, work, arrangement)
    again = max(len({unit.rpartition(".")[0] for unit in stage.recompute}) for stage in uniform.layout.stages)
    does_not_fit = "" if uniform.fits else "; does not fit even so"

    def gain(plan: Plan | None) -> str:
        return "does not fit" if plan is None else f"{uniform.step_seconds / plan.step_seconds - 1:+.1%}"

    return {
        "uniform": f"{uniform.step_seconds:.2f} s, {again} layers recomputed a stage{does_not_fit}",
        "other split of whole layers, one recompute count": gain(_one_count(hardware, work, arrangement)),
        "uniform split, recomputation by stage": gain(_uniform_split(hardware, work, arrangement, uniform)),
        "both": gain(make_plan(hardware, work, arrangement, whole_layers=True)),
        "both, and boundaries inside layers": gain(make_plan(hardware, work, arrangement)),
    }


def _one_count(hardware: Any, work: Workload, arrangement: Arrangement) -> Plan | None:
    """The best split of whole layers when all stages recompute equally many."""
    problem = make_problem(hardware, work, arrangement, whole_layers=True)
    splits = [best_1f1b(replace(problem, same_recompute=count)) for count in range(work.model.num_layers + 1)[:8]]
    found = min((split for split in splits if split is not None), key=lambda split: split.seconds, default=None)
    return None if found is None else plan_of_split(hardware, work, arrangement, found)


def _uniform_split(hardware: Any, work: Workload, arrangement: Arrangement, uniform: Plan) -> Plan | None:
    """Uniform stages that each recompute as little as they can."""
    problem = make_problem(hardware, work, arrangement, whole_layers=True)
    cuts = tuple(stage.begin_unit for stage in uniform.layout.stages[1:])
    split = best_1f1b(replace(problem, cuts=cuts))
    return None if split is None else plan_of_split(hardware, work, arrangement, split)


def reported_utilisation() -> Claim:
    model = model_preset("skywork-moe")
    work = Workload(model, "bf16", 8192, 1, 1536)
    rate, peak = 690.0, 312e12
    plain, causal, full = (model_flops_per_token(work, kind) for kind in ("none", "causal", "full"))
    return Claim(
        "690 tokens/s a GPU and 38 % MFU",
        (
            ("weights alone (6 N)", f"{rate * plain / peak:.1%}"),
            ("with causal attention", f"{rate * causal / peak:.1%}"),
            ("with full attention", f"{rate * full / peak:.1%}"),
            ("causal, every layer's recomputation counted", f"{rate * causal * 8 / 6 / peak:.1%}"),
            ("full, every layer's recomputation counted", f"{rate * full * 8 / 6 / peak:.1%}"),
            ("FLOPs a token that 38 % would need", f"{0.38 * peak / rate / 1e9:.0f} G ({causal / 1e9:.0f} G causal)"),
            ("tokens/s that 38 % would be, causal", f"{0.38 * peak / causal:.0f}"),
        ),
        "N = 22.39 B active without the input embedding, 8,192 positions, 312 TFLOP/s",
        "the two figures do not agree under any usual convention: 690 tokens/s are 30 to 35 % without, and 43 to 47 % "
        "with full recomputation counted",
        "moeforge claims",
    )


def fp8_weights_on_4090() -> Claim:
    model = model_preset("skywork-moe")
    vocabulary = 2 * model.vocab_size * model.hidden_size
    small = model.num_layers * (2 * model.hidden_size + 16 * model.hidden_size) + model.hidden_size
    wide = vocabulary + small
    weights = model.parameters() - wide + 2 * wide
    server = 8 * 24 * 2**30
    return Claim(
        "FP8 weights fit one server of 8 RTX 4090 (192 GB)",
        (
            ("weights", f"{weights / GB:.1f} GB ({weights / 2**30:.1f} GiB)"),
            ("memory of the server", f"{server / GB:.1f} GB (192 GiB)"),
            ("left a GPU for KV cache, activations and the context", f"{(server - weights) / 8 / GB:.1f} GB"),
        ),
        "one byte a weight; embedding, head, gates and norms in bf16; scales neglected",
        "holds",
        "moeforge claims",
    )


def output_rate_on_4090() -> Claim:
    return Claim(
        "2,200 tokens/s on 8 RTX 4090",
        serving_claims.figures(),
        "output tokens of decode steps, FP8 weights as released, 0.95 x 23.65 GiB - 1 GB usable a card, every sequence "
        "with so many live tokens; bytes over 857 GB/s (0.85 of the data sheet), or FLOPs over 150 TFLOP/s where they "
        "take longer; experts evenly used; 105 all-reduces of latency + 7/4 bytes / bus bandwidth, the logits gathered "
        "in bf16, nothing hidden. TP 4 x PP 2: 26 layers and 9 heads a card, 53 and 52 all-reduces of 3/2 bytes, two "
        "micro-batches of half the sequences that alternate between the stages, half of the host time for each turn. "
        "The buses are assumptions; 42 us is a measured latency floor of 8 cards. The report names no batch, context "
        "or script",
        "plausible as a peak of short contexts, not as a general rate. With peer-to-peer kernels it comes from about "
        "74 sequences on, through host memory from about 100, or from 136 with 10 ms of host time a step, which is "
        "most of the cache at 256 tokens each; over a bus of 6 GB/s it does not fit the memory at 256 tokens. Uneven "
        "TP 8 needs fewer sequences than the even TP 4 x PP 2 wherever the bus has 12 GB/s or more; over 6 GB/s, with "
        "a full cache, TP 4 x PP 2 is the faster of the two. It holds as many KV tokens (a few more: routers and norms "
        "are held half as often)",
        "moeforge plan serve skywork-moe --gpus 8x4090 --weights fp8",
    )


def as_json(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [asdict(claim) | {"figures": dict(claim.figures)} for claim in claims]
