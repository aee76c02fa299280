"""The equivariant linear map: kernels and formulas against e3nn and against FP64.

Bounds: a sum of K products whose operands are rounded with relative error u and added with unit roundoff v is off by at
most (2u + K v) sum |x||W|; the right side is the same map applied to absolute values.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from e3nn import o3

from mace_triton import layout
from mace_triton import reference_linear as reference
from mace_triton.kernels import linear as kernels
from mace_triton.kernels import offline, tiles
from mace_triton.linear_problem import LinearProblem
from mace_triton.nn import linear as nn_linear
from mace_triton.nn.linear import IrrepsLinear
from mace_triton.ops import dispatch
from mace_triton.ops import linear as ops
from mace_triton.ops.linear import linear, lowp_weight

MODES = ["fp64", "ieee", "tf32x3", "tf32", "bf16", "fp16"]
OPERAND_ERROR = {"fp64": 2**-53, "ieee": 2**-24, "tf32x3": 2**-20, "tf32": 2**-11, "bf16": 2**-7, "fp16": 2**-11}
SLOTS = (
    "17x0e+8x0e+20x1o+3x2e+2x3o",
    "5x0e+33x1o+2x1e+6x0e+3x2e+1x3o",
)  # several slots an irreps, odd sizes, 2x1e unfed
CASES = {
    "slots": {"irreps_in": SLOTS[0], "irreps_out": SLOTS[1], "biases": (True, False, False, True, False, False)},
    "mace": {"irreps_in": "32x0e+32x1o+32x0e", "irreps_out": "32x0e+32x1o"},
    "readout": {"irreps_in": "24x0e+8x1o", "irreps_out": "1x0e"},
    "path": {"irreps_in": "3x0e+5x0e+2x1o", "irreps_out": "4x0e+2x1o", "path_normalization": "path"},
    "chosen": {"irreps_in": "3x0e+5x0e", "irreps_out": "2x0e+3x0e", "instructions": ((0, 0), (0, 1), (1, 1), (1, 1))},
}


def case(name: str, layout_in: str = "mul_ir", layout_out: str = "mul_ir") -> LinearProblem:
    return LinearProblem(**CASES[name], layout_in=layout_in, layout_out=layout_out)


def dtype_of(mode: str) -> torch.dtype:
    return torch.float64 if mode == "fp64" else torch.float32


def inputs(problem: LinearProblem, nodes: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """x, weight, residual and, if the problem has one, bias; all require gradients."""
    shapes = {"x": (nodes, problem.dim_in), "weight": (problem.weight_numel,), "residual": (nodes, problem.dim_out)}
    if problem.bias_numel:
        shapes["bias"] = (problem.bias_numel,)
    return {name: torch.randn(shape, dtype=dtype, device=device).requires_grad_() for name, shape in shapes.items()}


def assert_within(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, mode: str, length: int) -> None:
    """|actual - exact| <= (2 u + length v) magnitude, and a little for additions after the sum."""
    unit = torch.finfo(dtype_of(mode)).eps
    bound = (2 * OPERAND_ERROR[mode] + (length + 4) * unit) * magnitude + 4 * unit * exact.abs()
    excess = (actual.double() - exact).abs() - bound
    assert bool((excess <= 0).all()), f"off by up to {excess.max():.2e} above the bound at {int(excess.argmax())}"


def o3_linear(problem: LinearProblem) -> o3.Linear:
    module = o3.Linear(
        problem.irreps_in,
        problem.irreps_out,
        instructions=list(problem.instructions),
        biases=list(problem.biases),
        path_normalization=problem.path_normalization,
    )
    if problem.bias_numel:
        torch.nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("name", CASES)
def test_formula_is_e3nn_linear(name):
    module = o3_linear(case(name)).double()
    problem = LinearProblem.from_module(module)
    assert problem == case(name)
    x = torch.randn(6, problem.dim_in, dtype=torch.float64)
    bias = module.bias if problem.bias_numel else None
    torch.testing.assert_close(reference.linear(problem, x, module.weight, "fp64", bias), module(x))


@pytest.mark.parametrize("layouts", [("mul_ir", "ir_mul"), ("ir_mul", "mul_ir"), ("ir_mul", "ir_mul")])
def test_layouts_only_move_elements(layouts):
    plain, moved = case("slots"), case("slots", *layouts)
    data = inputs(plain, 5, torch.float64, torch.device("cpu"))
    x = layout.convert_layout(data["x"], plain.irreps_in, "mul_ir", layouts[0])
    out = reference.linear(moved, x, data["weight"], "fp64", data["bias"])
    back = layout.convert_layout(out, plain.irreps_out, layouts[1], "mul_ir")
    torch.testing.assert_close(back, reference.linear(plain, data["x"], data["weight"], "fp64", data["bias"]))


@pytest.mark.parametrize("name", CASES)
def test_key_round_trip(name):
    problem = case(name, "ir_mul")
    assert LinearProblem.from_key(problem.key) == problem


def check_against_fp64(problem: LinearProblem, mode: str, device: torch.device, nodes: int = 13) -> None:
    """Output and every gradient of the op, run by the kernels, against the formula in FP64."""
    scale = 0.3
    data = inputs(problem, nodes, dtype_of(mode), device)
    exact = {name: value.detach().double().requires_grad_() for name, value in data.items()}
    before = dispatch.calls.copy()
    out = linear(problem, **data, mode=mode, scale=scale)
    grad = torch.randn_like(out)
    grads = dict(zip(data, torch.autograd.grad(out, list(data.values()), grad), strict=True))
    ran = dispatch.calls - before
    assert {op for (op, which) in ran if which == "triton"} == {"linear_fwd", "linear_grad_x", "linear_grad_w"}
    want = reference.linear(problem, exact["x"], exact["weight"], "fp64", exact.get("bias"), exact["residual"], scale)
    wants = dict(zip(exact, torch.autograd.grad(want, list(exact.values()), grad.double()), strict=True))
    x, weight, g = (t.detach().double().abs() for t in (data["x"], data["weight"], grad))
    length = max(problem.dim_in, problem.dim_out)
    magnitude = reference.linear(problem, x, weight, "fp64", scale=scale)
    assert_within(out, want, magnitude + data["residual"].abs(), mode, length)
    assert_within(grads["x"], wants["x"], reference.linear_grad_x(problem, g, weight, "fp64", scale), mode, length)
    magnitude = reference.linear_grad_w(problem, x, g, "fp64", scale)
    assert_within(grads["weight"], wants["weight"], magnitude, mode, nodes * 7)
    assert torch.equal(grads["residual"], grad)
    if problem.bias_numel:
        torch.testing.assert_close(grads["bias"].double(), wants["bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_match_fp64(name, mode, device):
    check_against_fp64(case(name), mode, device)


@pytest.mark.parametrize("layouts", [("mul_ir", "ir_mul"), ("ir_mul", "mul_ir"), ("ir_mul", "ir_mul")])
@pytest.mark.parametrize("name", ["slots", "mace"])
def test_kernels_take_both_layouts(name, layouts, device):
    check_against_fp64(case(name, *layouts), "ieee", device)


@pytest.mark.parametrize(
    "tile",
    [
        tiles.Tile.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, LANES=8),
        tiles.Tile.of(BLOCK_M=128, BLOCK_N=32, BLOCK_K=32, LANES=16),
    ],
)
def test_every_tile_gives_the_same_map(tile, device):
    with tiles.forced("linear_fwd", tile):
        check_against_fp64(case("slots"), "ieee", device)


def test_3xtf32_adds_up_short_blocks_whatever_the_tile_says(device):
    tile = tiles.Tile.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, LANES=4)
    problem = LinearProblem("128x0e+128x1o", "64x0e+64x1o")
    blocks = {mode: kernels._map_plan(problem, False, mode, 1.0, device, tile).constants["BLOCK_K"] for mode in MODES}
    assert blocks.pop("tf32x3") == 32
    assert set(blocks.values()) == {128}
    tile = tiles.Tile.of(BLOCK_R=64, BLOCK_U=64, BLOCK_W=64, LANES=4)
    blocks = {mode: kernels._wgrad_plan(problem, mode, 1.0, device, tile).constants["BLOCK_R"] for mode in MODES}
    assert blocks.pop("tf32x3") == 32
    assert set(blocks.values()) == {64}


@pytest.mark.parametrize("nodes", [8, 24, 192, 400, 1000])
def test_3xtf32_is_as_exact_as_fp32(nodes, device):
    """Root mean square error, over FP64's root mean square: FP32's is 2.1e-7 for sums of 128 products."""
    if device.type != "cuda":
        pytest.skip("the interpreter's products are FP32")
    for layouts in (("mul_ir", "ir_mul"), ("ir_mul", "mul_ir"), ("ir_mul", "ir_mul")):
        problem = LinearProblem("128x0e+128x1o", "128x0e+128x1o", layout_in=layouts[0], layout_out=layouts[1])
        x, grad = (torch.randn(nodes, problem.dim_in, device=device) for _ in range(2))
        weight = torch.randn(problem.weight_numel, device=device)
        found = kernels.forward(problem, x, weight, None, None, "tf32x3", 1.0, torch.float32)
        back = kernels.grad_x(problem, grad, weight, "tf32x3", 1.0)
        exact = reference.linear(problem, x.double(), weight.double(), "fp64")
        exact_back = reference.linear_grad_x(problem, grad.double(), weight.double(), "fp64", 1.0)
        for actual, wanted in ((found, exact), (back, exact_back)):
            assert float((actual - wanted).norm() / wanted.norm()) < 2e-7


def test_the_low_precision_modes_round_their_operands(device):
    problem = case("mace")
    data = inputs(problem, 13, torch.float32, device)
    exact = reference.linear(problem, data["x"].double(), data["weight"].double(), "fp64")
    error = {m: float((linear(problem, data["x"], data["weight"], mode=m) - exact).abs().max()) for m in MODES[1:]}
    assert error["ieee"] < error["tf32"] / 20
    assert error["fp16"] < error["bf16"] / 4


def test_weight_gradient_has_the_same_bits_every_run(device):
    problem = case("slots")
    x, grad = torch.randn(70, problem.dim_in, device=device), torch.randn(70, problem.dim_out, device=device)
    first, second = (kernels.grad_w(problem, x, grad, "ieee", 1.0) for _ in range(2))
    assert torch.equal(first, second)
    exact = reference.linear_grad_w(problem, x.double(), grad.double(), "fp64", 1.0)
    magnitude = reference.linear_grad_w(problem, x.double().abs(), grad.double().abs(), "fp64", 1.0)
    assert_within(first, exact, magnitude, "ieee", 70 * 7)


def test_no_nodes_and_no_weights(device):
    problem = case("mace")
    x = torch.zeros(0, problem.dim_in, device=device, requires_grad=True)
    weight = torch.randn(problem.weight_numel, device=device, requires_grad=True)
    out = linear(problem, x, weight, mode="ieee")
    gx, gw = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == (0, problem.dim_out)
    assert gx.shape == x.shape
    assert not gw.any()
    unfed = LinearProblem("3x0e", "3x1o")
    out = linear(unfed, torch.randn(4, 3, device=device), torch.zeros(0, device=device), mode="ieee")
    assert torch.equal(out, torch.zeros(4, 9, device=device))


@pytest.mark.parametrize("name", ["chosen", "path"])
def test_gradcheck_through_the_kernels(name, device):
    problem = case(name)
    data = inputs(problem, 2, torch.float64, device)

    def apply(x, weight, residual):
        return linear(problem, x, weight, residual=residual, mode="fp64", scale=0.7)

    assert torch.autograd.gradcheck(apply, tuple(data.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, tuple(data.values()), fast_mode=True)


@pytest.mark.usefixtures("reference_path")
def test_gradcheck_on_the_cpu():
    problem = case("slots")
    data = inputs(problem, 2, torch.float64, torch.device("cpu"))

    def apply(x, weight, residual, bias):
        return linear(problem, x, weight, residual=residual, bias=bias, mode="fp64", scale=0.7)

    before = dispatch.calls["linear_fwd", "reference"]
    assert torch.autograd.gradcheck(apply, tuple(data.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, tuple(data.values()), fast_mode=True)
    assert dispatch.calls["linear_fwd", "reference"] > before


def test_opcheck(device):
    problem = case("chosen")
    data = inputs(problem, 3, torch.float32, device)
    rest = (problem.key, "ieee", 0.5)
    grad = torch.randn(3, problem.dim_out, device=device, requires_grad=True)
    torch.library.opcheck(ops._linear, (data["x"], data["weight"], None, None, data["residual"], *rest))
    torch.library.opcheck(ops._grad_x, (grad, data["weight"], None, *rest))
    torch.library.opcheck(ops._grad_w, (data["x"], grad, *rest))


def test_summed_and_sliced_gradients(device):
    problem = case("mace")
    data = inputs(problem, 6, torch.float32, device)
    out = linear(problem, data["x"], data["weight"], mode="ieee")
    expanded = torch.autograd.grad(out.sum(), data["x"], retain_graph=True)[0]
    dense = torch.autograd.grad(out, data["x"], torch.ones_like(out))[0]
    assert torch.equal(expanded, dense)
    wide = torch.randn(6, 2 * problem.dim_in, device=device)[:, ::2]
    assert torch.equal(
        linear(problem, wide, data["weight"], mode="ieee"),
        linear(problem, wide.contiguous(), data["weight"], mode="ieee"),
    )


@pytest.mark.parametrize("leaf", [True, False])
def test_a_pass_for_x_alone_computes_no_gradient_of_the_weights(leaf, device):
    problem = case("mace")
    x, weight = (t for name, t in inputs(problem, 4, torch.float32, device).items() if name in ("x", "weight"))
    out = linear(problem, x, weight if leaf else 2 * weight, mode="ieee").square().sum()

    def runs(*wanted) -> int:
        before = dispatch.calls["linear_grad_w", "triton"]
        torch.autograd.grad(out, wanted, retain_graph=True)
        return dispatch.calls["linear_grad_w", "triton"] - before

    assert (runs(x), runs(x, weight), runs(weight)) == (0, 1, 1)
    before = dispatch.calls["linear_grad_w", "triton"]
    out.backward()
    assert dispatch.calls["linear_grad_w", "triton"] == before + 1


def test_vmap_over_autograd_grad(device):
    problem = case("chosen")
    data = inputs(problem, 2, torch.float64, device)
    out = linear(problem, data["x"], data["weight"], mode="fp64") ** 2
    (grad,) = torch.autograd.grad(out.sum(), data["x"], create_graph=True)
    directions = torch.eye(grad.numel(), dtype=grad.dtype, device=device).reshape(-1, *grad.shape)

    def row(direction):
        return torch.autograd.grad(grad, data["x"], direction, retain_graph=True)[0]

    hessian = torch.vmap(row)(directions)
    torch.testing.assert_close(hessian, torch.stack([row(direction) for direction in directions]))
    assert hessian.abs().max() > 0


@pytest.mark.parametrize("mode", ["ieee", "bf16"])
def test_compiles_into_one_graph(mode, device):
    module = IrrepsLinear(o3_linear(case("slots")), mode).to(device)
    x = torch.randn(5, module.problem.dim_in, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, want = compiled(x), module(x)
    torch.testing.assert_close(out, want)
    got = torch.autograd.grad(out.square().sum(), module.weight)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), module.weight)[0])


def test_module_shares_parameters_and_state_dict(device):
    plain = o3_linear(case("slots")).to(device)
    ours = IrrepsLinear(plain, "ieee")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert ours.weight is plain.weight
    x = torch.randn(2, 3, ours.problem.dim_in, device=device)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    back = ours.restore()
    assert back.weight is plain.weight
    assert torch.equal(back(x), plain(x))


def test_module_copies_pickles_and_converts(device):
    ours = IrrepsLinear(o3_linear(case("mace")).to(device), "bf16")
    x = torch.randn(4, ours.problem.dim_in, device=device)
    want = ours(x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            twin.weight.zero_()
        assert not twin(x).any()
    assert torch.equal(ours(x), want)
    double = copy.deepcopy(ours).double()
    assert double.run_mode == "fp64"
    assert torch.allclose(double(x.double()), want.double(), rtol=0.1, atol=0.1)


def test_low_precision_weights_are_copied_once_per_version(device, monkeypatch):
    copies = []
    monkeypatch.setattr(nn_linear, "lowp_weight", lambda w, mode, p: copies.append(mode) or lowp_weight(w, mode, p))
    ours = IrrepsLinear(o3_linear(case("mace")).to(device), "fp16")
    x = torch.randn(4, ours.problem.dim_in, device=device)
    first = ours(x)
    ours(x)
    assert copies == ["fp16"]
    with torch.no_grad():
        ours.weight.mul_(2)
    torch.testing.assert_close(ours(x), 2 * first)
    assert copies == ["fp16", "fp16"]


def test_frozen_weights_are_split_once(device, monkeypatch):
    copies = []
    monkeypatch.setattr(nn_linear, "lowp_weight", lambda w, mode, p: copies.append(mode) or lowp_weight(w, mode, p))
    ours = IrrepsLinear(o3.Linear("64x0e", "96x0e").to(device), "tf32x3")
    x = torch.randn(5, 64, device=device).requires_grad_()
    trained = ours(x)
    assert copies == []
    ours.requires_grad_(False)
    frozen = [ours(x), ours(x)]
    assert copies == ["tf32x3"]
    for out in frozen:
        assert torch.equal(out, trained)
        (gx,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(gx, torch.autograd.grad(trained.sum(), x, retain_graph=True)[0])


def test_bad_arguments_are_named(device):
    problem = case("mace")
    x, weight = torch.randn(4, problem.dim_in, device=device), torch.randn(problem.weight_numel, device=device)
    with pytest.raises(ValueError, match="mode must be one of"):
        linear(problem, x, weight, mode="fp8")
    with pytest.raises(TypeError, match=r"x must be torch\.float64"):
        linear(problem, x, weight, mode="fp64")
    with pytest.raises(ValueError, match=r"x must have shape \[N, 160\]"):
        linear(problem, x[:, 1:], weight, mode="ieee")
    with pytest.raises(ValueError, match="x must have shape"):
        linear(problem, x[None], weight, mode="ieee")
    with pytest.raises(ValueError, match="weight must have shape"):
        linear(problem, x, weight[1:], mode="ieee")
    with pytest.raises(TypeError, match="weight must have x's dtype"):
        linear(problem, x, weight.half(), mode="fp16")
    with pytest.raises(ValueError, match="weight is on meta"):
        linear(problem, x, weight.to("meta"), mode="ieee")
    with pytest.raises(ValueError, match="residual must have shape"):
        linear(problem, x, weight, residual=x[:2], mode="ieee")
    with pytest.raises(ValueError, match="weight_lowp"):
        linear(problem, x, weight, weight_lowp=weight, mode="bf16")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"irreps_in": "3q", "irreps_out": "1x0e"}, "irreps_in"),
        ({"irreps_in": "3x0e", "irreps_out": "1x0e", "layout_in": "x"}, "layout_in"),
        ({"irreps_in": "3x0e", "irreps_out": "1x1o", "instructions": ((0, 0),)}, "cannot feed"),
        ({"irreps_in": "3x0e", "irreps_out": "1x0e", "instructions": ((0, 1),)}, "outside"),
        ({"irreps_in": "3x1o", "irreps_out": "1x1o", "biases": (True,)}, "only 0e"),
        ({"irreps_in": "3x0e", "irreps_out": "1x0e", "path_normalization": "none"}, "path_normalization"),
    ],
)
def test_bad_problems_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        LinearProblem(**fields)


def test_modules_it_cannot_stand_in_for_are_refused():
    with pytest.raises(ValueError, match="external weights"):
        IrrepsLinear(o3.Linear("3x0e", "2x0e", internal_weights=False, shared_weights=True), "ieee")
    with pytest.raises(ValueError, match="f_in/f_out"):
        IrrepsLinear(o3.Linear("3x0e", "2x0e", f_in=2, f_out=2), "ieee")
    with pytest.raises(ValueError, match=r"must be an e3nn\.o3\.Linear"):
        IrrepsLinear(torch.nn.Linear(3, 2), "ieee")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    cases = [c for c in kernels.offline_cases(target) if "transposed" in c.name or "wgrad" in c.name]
    for name, stats in offline.compile_cases(cases, target).items():
        assert stats.spills == 0, (name, stats)
        assert stats.stack == 0, (name, stats)
        if "ieee" not in name:
            matrix = {"sm_80": "mma.sync", "sm_90": "mma", "gfx942": "v_mfma"}[target]
            assert any(matrix in opcode for opcode in stats.instructions), (name, stats)


def test_16_bit_products_use_the_warp_group_units_of_sm_90():
    case = next(c for c in kernels.offline_cases() if c.name == "linear_fwd bf16 mul_ir->ir_mul")
    rest = (case.num_warps, case.num_stages, case.divisible)
    stats = offline.compile_offline(kernels.linear_fwd_kernel, case.signature, case.constexprs, "sm_90", *rest)
    assert stats.instructions["wgmma.mma_async"] > 0
    assert (stats.spills, stats.stack) == (0, 0)


def test_a_case_that_does_not_compile_is_reported():
    case = next(c for c in kernels.offline_cases() if c.name == "linear_fwd bf16 mul_ir->ir_mul")
    with pytest.raises(RuntimeError, match="compiling for sm_90 failed"):
        offline.compile_offline(kernels.linear_fwd_kernel, case.signature, case.constexprs | {"BLOCK_M": 48}, "sm_90")
    with pytest.raises(ValueError, match="target must look like"):
        offline.gpu_target("hopper")


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fp64"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])
def test_nan_stays_nan(mode, bits, device):
    """0x7fffffff is the NaN that GPU arithmetic makes; adding to its bits to round them would make it zero."""
    problem = case("readout")
    x, weight, *_ = (t.detach() for t in inputs(problem, 3, torch.float32, device).values())
    x[1, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = linear(problem, x, weight, mode=mode)
    assert out.isnan().any(dim=1).tolist() == [False, True, False]
    assert reference.linear(problem, x, weight, mode, None, None, 1.0).isnan().any(dim=1).tolist() == [
        False,
        True,
        False,
    ]
