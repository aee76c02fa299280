"""The symmetric contraction's module against MACE's own, in FP64, and what it costs and keeps."""

from __future__ import annotations

import copy
import pickle

import mace  # noqa: F401  before e3nn
import pytest
import torch
from e3nn import o3
from mace.modules.irreps_tools import reshape_irreps
from mace.modules.symmetric_contraction import SymmetricContraction as PlainContraction
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from mace_triton.layout import convert_layout
from mace_triton.nn.symmetric_contraction import ReshapeIrreps, SymmetricContraction, parameters_of, problem_of
from mace_triton.ops import dispatch
from mace_triton.ops.species import species_plan

OUTPUTS = ("{c}x0e", "{c}x0e+{c}x1o", "{c}x0e+{c}x1o+{c}x2e", "{c}x0e+{c}x1o+{c}x2e+{c}x3o")
INPUT = "{c}x0e+{c}x1o+{c}x2e+{c}x3o"


@pytest.fixture(
    params=[(o, k, r) for o in OUTPUTS[:3] for k in (1, 2, 3) for r in (False, True)] + [(OUTPUTS[3], 2, True)]
)
def plain(request) -> PlainContraction:
    """MACE's modules, FP64, four species."""
    return build(*request.param)


def build(
    outputs: str, correlation: int, reduced: bool, channels: int = 3, elements: int = 4, inputs: str = INPUT
) -> PlainContraction:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        irreps = (text.format(c=channels) for text in (inputs, outputs))
        return PlainContraction(*irreps, correlation, num_elements=elements, use_reduced_cg=reduced)
    finally:
        torch.set_default_dtype(before)


def features(nodes: int = 6, channels: int = 3, elements: int = 4, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(nodes, channels, dim, dtype=torch.float64, requires_grad=True)
    return x, torch.nn.functional.one_hot(torch.arange(nodes) ** 2 % elements, elements).double()


def test_module_is_mace_in_fp64(plain, reference_path):
    ours, (x, y) = SymmetricContraction(plain, "ir_mul"), features()
    want = plain(x, y)
    dispatch.calls.clear()
    got = convert_layout(ours(x, y), plain.irreps_out, "ir_mul", "mul_ir")
    assert dispatch.calls["symmetric_contraction_fwd", "reference"] == 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))
    weights = [w for w in parameters_of(plain) if w.requires_grad]
    g = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad(out, (x, *weights), g, create_graph=True) for out in (got, want)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11 * float(want.abs().max()))


def test_numbers_of_terms_are_those_of_the_design():
    """94, 410 and 887: what is left of 28, 86 and 159 paths once products of features commute."""
    counts = [len(problem_of(build(outputs, 3, False))[0].terms) for outputs in OUTPUTS[:3]]
    assert counts == [94, 410, 887]
    assert [len(problem_of(build(outputs, 3, True))[0].terms) for outputs in OUTPUTS[:3]] == counts


def test_module_stays_maces_class():
    before = build(OUTPUTS[1], 2, True)
    ours, (x, y) = SymmetricContraction(before), features()
    assert isinstance(ours, PlainContraction)
    assert ours.state_dict().keys() == before.state_dict().keys()
    want = before(x, y)
    for other in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), ours.restore()):
        torch.testing.assert_close(other(x, y), want)
    assert type(ours.restore()) is PlainContraction
    assert ours.restore().state_dict().keys() == before.state_dict().keys()
    assert ours.float()(x.float(), y.float()).dtype == torch.float32


def test_attributes_that_are_not_one_hot_go_maces_way():
    before = build(OUTPUTS[1], 2, True)
    ours, (x, y) = SymmetricContraction(before), features()
    for attrs in (0.5 * y, y + torch.roll(y, 1, 1), torch.zeros_like(y)):
        dispatch.calls.clear()
        torch.testing.assert_close(ours(x, attrs), before(x, attrs))
        assert not dispatch.calls
    y[0] *= 3  # the same tensor, changed in place after it had been looked at
    torch.testing.assert_close(ours(x, y), before(x, y))


def test_agnostic_weights_do_not_ask_for_the_species():
    before = build(OUTPUTS[1], 2, True, elements=1)
    ours, (x, _) = SymmetricContraction(before, agnostic=True), features()
    torch.testing.assert_close(ours(x, torch.ones(6, 1, dtype=torch.float64)), before(x, torch.ones(6, 1).double()))


def test_coefficients_are_made_once_per_version(monkeypatch):
    ours, made = SymmetricContraction(build(OUTPUTS[0], 2, True)).requires_grad_(False), []
    run = ours._weights
    monkeypatch.setattr(ours, "_weights", lambda *args: made.append(1) or run(*args))
    first = ours.coefficients()
    assert ours.coefficients() is first
    with torch.no_grad():
        parameters_of(ours)[0].add_(1.0)
    assert not torch.equal(ours.coefficients(), first)
    assert len(made) == 2
    assert not ours.requires_grad_(True).coefficients().requires_grad


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize(
    ("outputs", "correlation", "channels", "inputs", "elements"),
    [
        (0, 3, 3, INPUT, 4),
        (1, 2, 3, INPUT, 4),
        (1, 4, 3, "{c}x0e+{c}x1o", 4),
        (1, 2, 96, "{c}x0e+{c}x1o", 4),
        (1, 2, 192, "{c}x0e+{c}x1o", 4),
        (1, 2, 3, INPUT, 1),
    ],
)
def test_training_on_energy_and_forces_is_maces(outputs, correlation, channels, inputs, elements, reduced, device):
    """By the kernels, with a species that no node has; the loss holds first derivatives, so this takes second ones.

    One element stands for weights that do not depend on the species (agnostic).
    """
    before = build(OUTPUTS[outputs], correlation, reduced, channels, elements, inputs).to(device)
    ours = SymmetricContraction(before, agnostic=elements == 1)
    dim = sum(ir.dim for _, ir in before.irreps_in)
    x, y = (t.detach().to(device) for t in features(6, channels, elements, dim))
    found = []
    dispatch.calls.clear()
    for module in (ours, before):
        leaf = x.clone().requires_grad_()
        energy = module(leaf, y).square().sum()
        (force,) = torch.autograd.grad(energy, leaf, create_graph=True)
        weights = [w for w in parameters_of(module) if w.requires_grad]
        found.append(torch.autograd.grad(energy + force.square().sum(), weights))
    assert {op for op, which in dispatch.calls if which == "triton"} == {
        f"symmetric_contraction_{word}" for word in ("combine", "fwd", "bwd", "bwd_bwd")
    }
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11 * float(theirs.abs().max()) + 1e-30)


@pytest.mark.parametrize(("reduced", "extra"), [(True, []), (False, ["cat", "bmm"])])
def test_a_training_step_takes_few_launches(reduced, extra, monkeypatch):
    """Forward and gradients of x and of the weights; `extra`: what runs in the forward outside the op."""
    if not dispatch.interpreting():
        pytest.skip("launches are counted in the interpreter")
    ours, (x, y) = SymmetricContraction(build(OUTPUTS[1], 2, reduced), "ir_mul"), features()
    launched, run = [], GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launched.append(self.fn) or run(self, *a, **k))
    species_plan(y)
    with Calls() as calls:
        out = ours(x, y)
    assert calls.names == extra
    torch.autograd.grad(out.sum(), (x, *parameters_of(ours)))
    names = [fn.__name__.removeprefix("symmetric_contraction_").removesuffix("_kernel") for fn in launched]
    assert names == ["combine", "fwd", "bwd", "weights", "tile_sum"]


class Calls(TorchDispatchMode):
    """The names of PyTorch's own operators that compute something."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and not func.is_view and "view" not in func.__name__:
            self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_paths_that_depend_on_each_other_are_merged():
    for outputs, rank in zip(OUTPUTS[:3], (13, 29, 49), strict=True):
        for reduced in (True, False):
            problem, mix = problem_of(build(outputs, 3, reduced))
            assert problem.paths == rank
            assert (mix is None) == reduced
    single = build(OUTPUTS[1], 3, False).float()  # rounding hides some of it from FP64, but not from FP32
    assert problem_of(single)[0].paths == 29
    assert problem_of(single.double())[1] is None


def test_module_compiles_into_one_graph(reference_path):
    ours, (x, y) = SymmetricContraction(build(OUTPUTS[1], 2, True)), features()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), ours(x, y))


def test_reshape_is_a_view():
    irreps = o3.Irreps(INPUT.format(c=3))
    theirs = reshape_irreps(irreps)
    ours, x = ReshapeIrreps(theirs), torch.randn(4, irreps.dim)
    ir_mul = convert_layout(x, irreps, "mul_ir", "ir_mul")
    assert torch.equal(ours(ir_mul), theirs(x))
    assert ours(ir_mul).data_ptr() == ir_mul.data_ptr()
    assert torch.equal(ours.restore()(x), theirs(x))
    with pytest.raises(ValueError, match="reshape: 3x0e"):
        ReshapeIrreps(reshape_irreps(o3.Irreps("3x0e+2x1o")))


def test_modules_it_cannot_stand_in_for_are_refused():
    with pytest.raises(TypeError, match="must be MACE's SymmetricContraction"):
        SymmetricContraction(torch.nn.Linear(2, 2))
    mixed = build(OUTPUTS[0], 1, True)
    mixed.irreps_in = type(mixed.irreps_in)("3x0e+2x1o")
    with pytest.raises(ValueError, match="one multiplicity everywhere"):
        SymmetricContraction(mixed)
