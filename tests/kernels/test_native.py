"""The native library against float64, in every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeforge.kernels import gate, native, rms_norm, split_qkv
from moeforge.kernels.fp8_weight import Fp8Weight, dequantize
from moeforge.kernels.native import NativeExperts, NativeWeight
from moeforge.kernels.rope import rotate

LIBRARY = native.library()
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="the native library was not built"),
    pytest.mark.usefixtures("instructions"),
]
BEST = native.name() or ""
SETS = ("avx512", "avx2", "portable")  # a processor that has one has those after it
EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=SETS[SETS.index(BEST) :] if BEST else ())
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    assert LIBRARY is not None and LIBRARY.moeforge_use(request.param.encode())
    assert native.name() == request.param
    yield
    assert LIBRARY.moeforge_use(BEST.encode())


def close(y: Tensor, expected: Tensor) -> None:
    """Within a rounding to bf16 of the result, and the rounding of float32 sums of it."""
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2**-9)


def fp8_weight(outputs: int, inputs: int, kind: str, offset: int) -> Fp8Weight:
    """All magnitudes, subnormal ones too, with scales of very different size."""
    values = (torch.randn(outputs, inputs) * torch.logspace(-3, 2, inputs)).to(torch.float8_e4m3fn)
    rows = outputs if kind == "channel" else -(-outputs // 16)
    blocks = -(-(inputs + offset) // 128) if kind == "block" else 1
    scales = torch.rand(rows, blocks) * torch.logspace(-3, 0, rows)[:, None]
    return Fp8Weight(values, scales, offset if kind == "block" else 0)


def packed(weight: Fp8Weight, gated: bool = False) -> NativeWeight:
    return NativeWeight(weight.values, weight.scales, weight.column_offset, gated)


@EXAMPLES
@given(st.integers(0, 70), st.integers(1, 130), st.integers(1, 150), st.booleans())
def test_linear(rows: int, outputs: int, pairs: int, bias: bool) -> None:
    x, w = torch.randn(rows, 2 * pairs).bfloat16(), (torch.randn(outputs, 2 * pairs) / pairs).bfloat16()
    b = torch.randn(outputs).bfloat16() if bias else None
    y = NativeWeight(w).linear(x, b)
    assert y.dtype == torch.bfloat16
    close(y, F.linear(x.double(), w.double(), None if b is None else b.double()))


@EXAMPLES
@given(
    st.integers(0, 30),
    st.integers(1, 70),
    st.integers(1, 75),
    st.sampled_from(["tensor", "channel", "block"]),
    st.integers(0, 7),
)
def test_linear_of_fp8_weights(rows: int, outputs: int, quads: int, kind: str, offset: int) -> None:
    weight = fp8_weight(outputs, 4 * quads, kind, 16 * offset)
    x = torch.randn(rows, 4 * quads).bfloat16()
    expected = F.linear(x.double(), dequantize(weight, torch.float64))
    size = F.linear(x.double().abs(), dequantize(weight, torch.float64).abs())
    y = packed(weight).linear(x).double()
    assert ((y - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all()


def test_every_e4m3_value_is_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = NativeWeight(values.repeat(4, 1).T.contiguous(), torch.ones(256, 1))  # [256, 4]
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bfloat16()
    finite = ~values.float().isnan()
    y = weight.linear(x)
    assert torch.equal(y[:, finite].float(), values.float()[finite].expand(4, -1))
    assert y[:, ~finite].isnan().all()


@pytest.mark.parametrize("kind", ["bf16", "block"])
def test_a_row_has_the_same_bits_in_any_company(kind: str) -> None:
    x = torch.randn(5000, 160).bfloat16()  # more than are copied at once
    weight = NativeWeight(torch.randn(48, 160).bfloat16()) if kind == "bf16" else packed(fp8_weight(48, 160, kind, 0))
    together = weight.linear(x)
    for begin, end in ((0, 1), (1, 3), (7, 20), (4000, 4999), (4999, 5000)):
        assert torch.equal(weight.linear(x[begin:end]), together[begin:end])


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3, 40, 300])
def test_experts(tokens: int, fp8: bool, top_k: int) -> None:
    e, d, f = 6, 48, 80
    if fp8:
        weights13, weights2 = ([fp8_weight(*shape, "block", 0) for _ in range(e)] for shape in ((2 * f, d), (d, f)))
        plain13, plain2 = ([dequantize(w, torch.float64) for w in ws] for ws in (weights13, weights2))
        experts = NativeExperts([packed(w, gated=True) for w in weights13], [packed(w) for w in weights2])
    else:
        rough13, rough2 = torch.randn(e, 2 * f, d).bfloat16() / 7, torch.randn(e, d, f).bfloat16() / 9
        plain13, plain2 = list(rough13.double()), list(rough2.double())
        experts = NativeExperts([NativeWeight(w, gated=True) for w in rough13], [NativeWeight(w) for w in rough2])
    x_TD = torch.randn(tokens, d).bfloat16()
    weights_TK, experts_TK = torch.rand(tokens, e - 1).topk(top_k, dim=1)  # the last expert has no token
    y = experts.routed(x_TD, weights_TK, experts_TK)
    expected = torch.zeros(tokens, d, dtype=torch.float64)
    size = torch.zeros(tokens, d, dtype=torch.float64)
    for i, up, down in zip(range(e), plain13, plain2, strict=True):
        h, g = F.linear(x_TD.double(), up).chunk(2, dim=1)
        share = (weights_TK * (experts_TK == i)).sum(1, keepdim=True)
        expected += share * F.linear(F.silu(h) * g, down)
        size += share * F.linear((F.silu(h) * g).abs(), down.abs())
    # The result and what is between the two maps are rounded to bf16.
    assert ((y.double() - expected).abs() <= 2**-8 * (expected.abs() + size)).all()


def test_more_tokens_than_are_computed_at_once() -> None:
    w13, w2 = torch.randn(3, 32, 16).bfloat16() / 4, torch.randn(3, 16, 16).bfloat16() / 4
    experts = NativeExperts([NativeWeight(w, gated=True) for w in w13], [NativeWeight(w) for w in w2])
    x_TD = torch.randn(5000, 16).bfloat16()
    weights_TK, experts_TK = torch.rand(5000, 3).topk(2, dim=1)
    together = experts.routed(x_TD, weights_TK, experts_TK)
    for begin, end in ((0, 7), (4090, 4100), (4999, 5000)):
        alone = experts.routed(x_TD[begin:end], weights_TK[begin:end], experts_TK[begin:end])
        assert torch.equal(alone, together[begin:end])


def test_one_expert_takes_all() -> None:
    w13, w2 = torch.randn(3, 32, 16).bfloat16(), torch.randn(3, 16, 16).bfloat16()
    experts = NativeExperts([NativeWeight(w, gated=True) for w in w13], [NativeWeight(w) for w in w2])
    x = torch.randn(50, 16).bfloat16()
    y = experts.routed(x, torch.ones(50, 1), torch.ones(50, 1, dtype=torch.int64))
    h, g = F.linear(x.double(), w13[1].double()).chunk(2, dim=1)
    expected = F.linear(F.silu(h) * g, w2[1].double())
    size = F.linear((F.silu(h) * g).abs(), w2[1].double().abs())
    assert ((y.double() - expected).abs() <= 2**-8 * (expected.abs() + size)).all()


@EXAMPLES
@given(
    st.integers(0, 9),
    st.integers(3, 20),
    st.integers(1, 3),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1.0, 0.3]),
)
def test_choosing_experts(
    tokens: int, e: int, k: int, d: int, bias: bool, renormalize: bool, scale: float | None
) -> None:
    x, w = torch.randn(tokens, d).bfloat16(), torch.randn(e, d)
    b = torch.randn(e) if bias else None
    expected = gate(F.linear(x.double(), w.double(), None if b is None else b.double()), k, scale, renormalize)
    weights, experts = native.NativeGate(w, b, k, scale, renormalize).choose(x)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int64
    gaps = expected.logits.sort(dim=1, descending=True).values.diff(dim=1).abs()[:, :k]
    clear = (gaps > 1e-4).all(1)  # elsewhere float32 may order them otherwise
    assert torch.equal(experts[clear], expected.experts[clear])
    torch.testing.assert_close(weights[clear].double(), expected.weights[clear], rtol=1e-3, atol=1e-4)


def test_ties_go_to_the_lower_index() -> None:
    x = torch.ones(1, 16).bfloat16()
    w = torch.zeros(5, 16)
    w[3:] = 1.0
    for scale in (None, 1.0):
        weights, experts = native.NativeGate(w, None, 3, scale, True).choose(x)
        assert experts.tolist() == [[3, 4, 0]] and weights[0, 0] == weights[0, 1]
    weights, experts = native.NativeGate(w * 0, None, 2, 1.0, True).choose(x)
    assert experts.tolist() == [[0, 1]] and weights.tolist() == [[0.5, 0.5]]


@EXAMPLES
@given(st.integers(0, 40), st.integers(1, 130))
def test_rms_norm(rows: int, width: int) -> None:
    x, w = torch.randn(rows, width).bfloat16(), torch.randn(width).bfloat16()
    with torch.no_grad():
        y = native.rms_norm(x, w, 1e-5)
        expected = rms_norm(x.double(), w.double(), 1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-6)


@EXAMPLES
@given(st.integers(0, 40), st.integers(1, 70))
def test_swiglu_and_its_gradient(rows: int, width: int) -> None:
    h, grad = (torch.randn(rows, 2 * width) * 4).bfloat16(), torch.randn(rows, width).bfloat16()
    wide = h.double().requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    expected = F.silu(gate) * up
    expected.backward(grad.double())
    close(native.swiglu(h), expected.detach())
    out, grad_h = native.swiglu_backward(h, grad)
    close(out, expected.detach())
    assert wide.grad is not None
    close(grad_h, wide.grad)


def test_swiglu_of_large_and_broken_numbers() -> None:
    gate = torch.tensor([200.0, -200.0, 3e38, -3e38, float("inf"), float("nan")]).bfloat16()
    y = native.swiglu(torch.cat([gate, torch.ones(6).bfloat16()])[None])[0].float()
    expected = F.silu(gate.float())
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-30, equal_nan=True)


@EXAMPLES
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
def test_split_qkv(tokens: int, groups: int, per_group: int, half: int) -> None:
    qkv = torch.randn(tokens, groups, per_group + 2, 2 * half).bfloat16()
    angle = torch.rand(tokens, 1, half) * 7
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    q, k, v = native.split_qkv(qkv, cos, sin)
    expected_q, expected_k, expected_v = split_qkv(qkv)
    assert torch.equal(v, expected_v)
    for y, x in ((q, expected_q), (k, expected_k)):
        close(y, rotate(x.double(), cos.double(), sin.double()))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 144, 256])
@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("window", [None, 5, 40])
def test_attention(head_dim: int, e4m3: bool, window: int | None) -> None:
    groups, heads, size, lengths = 3, 6, 16, [1, 16, 17, 100, 33]
    pages = torch.randn(2, 40, size, groups, head_dim).bfloat16()
    wide = pages.double()
    if e4m3:
        pages = pages.to(torch.float8_e4m3fn).view(torch.uint8)
        wide = pages.view(torch.float8_e4m3fn).double()
    table = torch.randperm(40)[:35].view(5, 7)
    q = torch.randn(5, heads, head_dim).bfloat16()
    y = native.attend(q, pages, table, torch.tensor(lengths), window)
    for b, length in enumerate(lengths):
        begin = 0 if window is None else max(0, length - window)
        k, v = (x[table[b]].flatten(0, 1)[begin:length].transpose(0, 1) for x in wide)
        expected = F.scaled_dot_product_attention(q[b].double()[:, None], k, v, enable_gqa=True)[:, 0]
        close(y[b], expected)
        alone = native.attend(q[b : b + 1], pages, table[b : b + 1], torch.tensor([length]), window)
        assert torch.equal(alone[0], y[b])


def test_writing_pages() -> None:
    pages, slots = torch.zeros(2, 4, 16, 3, 8).bfloat16(), torch.tensor([63, 0, 17])
    k, v = torch.randn(2, 3, 3, 8).bfloat16()
    native.write_pages(pages, slots, k, v)
    rows = pages.view(2, 64, 3, 8)
    assert torch.equal(rows[0, slots], k) and torch.equal(rows[1, slots], v)
    assert rows.count_nonzero() == k.count_nonzero() + v.count_nonzero()


def test_what_the_library_does_not_take_goes_to_torch() -> None:
    x, weight = torch.randn(3, 32).bfloat16(), torch.randn(32)
    with torch.no_grad():
        assert native.takes(x) and not native.takes(x, weight)
        torch.testing.assert_close(
            rms_norm(x, weight, 1e-5).double(), rms_norm(x.double(), weight.double(), 1e-5), rtol=2**-7, atol=1e-6
        )
    assert not native.takes(x)  # it has no gradients
    with pytest.raises(AssertionError):
        NativeWeight(torch.zeros(4, 16).bfloat16()).linear(torch.zeros(2, 8).bfloat16())


def test_a_gate_scale_of_zero_makes_all_equal() -> None:
    weights, experts = native.NativeGate(torch.randn(4, 16), None, 2, 0.0, False).choose(torch.randn(2, 16).bfloat16())
    assert (weights == 0.25).all() and experts.tolist() == [[0, 1]] * 2


def test_subnormal_e4m3_numbers_stay_where_subnormal_floats_are_flushed() -> None:
    values = torch.arange(1, 8, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = NativeWeight(values[:, None].expand(7, 4).contiguous(), torch.ones(7, 1))
    x = torch.tensor([[1.0, 0, 0, 0]]).bfloat16()
    try:
        torch.set_flush_denormal(True)
        y = weight.linear(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y[0].float(), torch.arange(1, 8) * 2.0**-9)


def test_strides_do_not_matter() -> None:
    qkv = torch.randn(3, 2, 8, 4).bfloat16().transpose(2, 3)  # [3, 2, 4, 8]
    cos = torch.rand(1, 1, 4).bfloat16().expand(3, 1, 4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            native.split_qkv(qkv, cos, cos), native.split_qkv(qkv.contiguous(), cos.contiguous(), cos), strict=True
        )
    )


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    find = native.library.__wrapped__
    assert find() is not None
    monkeypatch.setattr(native, "_ABI", -1)
    assert find() is None
    monkeypatch.undo()
    monkeypatch.setitem(native._ARGUMENTS, "unheard_of", [])
    assert find() is None
