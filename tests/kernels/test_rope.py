import torch

from moeforge.kernels import rotate


def test_is_the_complex_product() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    angle = torch.randn(5, 1, 4, dtype=torch.float64)
    out = rotate(x, angle.cos(), angle.sin())
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(out, torch.cat([z.real, z.imag], -1), rtol=1e-12, atol=1e-12)


def test_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    frequency = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        return (
            rotate(q, (i * frequency).cos(), (i * frequency).sin())
            * rotate(k, (j * frequency).cos(), (j * frequency).sin())
        ).sum()

    torch.testing.assert_close(score(7, 4), score(103, 100), rtol=1e-10, atol=1e-12)


def test_gradient_also_with_a_length_factor() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(3, 1, 3, dtype=torch.float64)
    cos, sin = angle.cos() * 1.3, angle.sin() * 1.3
    assert torch.autograd.gradcheck(lambda y: rotate(y, cos, sin), (x,))


def test_no_heads_and_strided_input() -> None:
    angle = torch.randn(3, 1, 2)
    assert rotate(torch.zeros(3, 0, 4), angle.cos(), angle.sin()).shape == (3, 0, 4)
    wide = torch.randn(3, 5, 4)
    part = wide[:, 1:3]
    expected = rotate(part.contiguous(), angle.cos(), angle.sin())
    assert torch.equal(rotate(part, angle.cos(), angle.sin()), expected)
