import pytest
import torch
from e3nn import o3

from mace_triton.layout import convert_layout, to_ir_mul, to_mul_ir

IRREPS = ["3x0e", "2x0e+3x1o+1x2e", "17x1o+0x1e+2x0o", "4x0e+1x3o"]


@pytest.mark.parametrize("irreps", IRREPS)
def test_elements_move_to_their_place(irreps):
    irreps = o3.Irreps(irreps)
    x = torch.arange(5 * irreps.dim, dtype=torch.float64).reshape(5, irreps.dim)
    y = to_ir_mul(x, irreps)
    for (mul, ir), place in zip(irreps, irreps.slices(), strict=True):
        for channel in range(mul):
            for m in range(ir.dim):
                assert torch.equal(y[:, place.start + m * mul + channel], x[:, place.start + channel * ir.dim + m])


@pytest.mark.parametrize("irreps", IRREPS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_there_and_back(irreps, shape):
    x = torch.randn(*shape, o3.Irreps(irreps).dim)
    assert torch.equal(to_mul_ir(to_ir_mul(x, irreps), irreps), x)
    assert torch.equal(to_ir_mul(to_mul_ir(x, irreps), irreps), x)


def test_is_differentiable():
    irreps = "2x0e+3x1o"
    x = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: to_ir_mul(t, irreps), x)
    assert torch.autograd.gradgradcheck(lambda t: to_ir_mul(t, irreps), x)


def test_bad_arguments_are_named():
    x = torch.zeros(2, 11)
    with pytest.raises(ValueError, match="target"):
        convert_layout(x, "2x0e+3x1o", "mul_ir", "irmul")
    with pytest.raises(ValueError, match="must be 12"):
        to_ir_mul(x, "3x0e+3x1o")
    with pytest.raises(ValueError, match="irreps"):
        to_ir_mul(x, "3z0e")
