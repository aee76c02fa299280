"""The studies of time by backend and block, and of 16-bit accumulators and 2:4 sparsity."""

from dataclasses import replace

import mace  # noqa: F401  before e3nn
import numpy as np
import pytest
import torch
from rich.console import Console

from mace_triton import accelerate
from mace_triton.models import load_water
from mace_triton.ops import dispatch
from mace_triton.study import accumulation, claims, profile, report, sparsity, store, training

pytestmark = pytest.mark.torchscript


def test_a_small_profile(tmp_path, monkeypatch, reference_path):
    offered = {
        "e3nn": ("fp64", "fp32"),
        "cueq": ("fp32", "bf16 linears"),
        "mace_triton": ("bf16",),
        "engine": ("fp32",),
    }
    monkeypatch.setattr(profile, "OFFERED", offered)
    monkeypatch.setattr(profile, "QUICK", replace(profile.QUICK, levels=(1,), channels=4))
    monkeypatch.setattr(profile, "TOLERANCE", profile.TOLERANCE | {"bf16": 1e-6})
    profile.run(tmp_path, "cpu", True, Console(quiet=True))
    found = store.load(tmp_path)["profile"]
    done = {(row["backend"], row["precision"]): row for row in found["wholes"] if row["status"] == "ok"}
    failed = {(row["backend"], row["precision"]): row["status"] for row in found["wholes"] if row["status"] != "ok"}
    assert set(done) == {("e3nn", "fp64"), ("e3nn", "fp32"), ("cueq", "fp32"), ("engine", "fp32")}
    assert set(failed) == {("cueq", "bf16 linears"), ("mace_triton", "bf16")}
    assert all("forces err by" in reason for reason in failed.values())  # what is not right is not timed
    assert done["e3nn", "fp64"]["force_error"] == 0
    assert 0 < done["engine", "fp32"]["force_error"] < 1e-4
    blocks = {(row["backend"], row["block"]) for row in found["blocks"]}
    assert {block for backend, block in blocks if backend == "e3nn"} == set(profile.BLOCKS)
    assert not any(backend == "engine" for backend, _ in blocks)
    conv = next(row for row in found["blocks"] if row["block"] == "conv_tp")
    assert conv["forward"]["wall"] > 0
    assert conv["backward"]["wall"] > 0
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "## Energy and forces by backend, l = 1" in text
    assert "| conv_tp | e3nn | fp32 |" in text
    assert "](profile.svg)" in text
    assert (tmp_path / "profile.svg").read_text().count("engine fp32") == 1


def test_blocks_alone_give_what_they_give_inside():
    model = load_water(device="cpu", dtype=torch.float32).requires_grad_(False)
    inside = {}
    for block, name in profile.BLOCKS.items():
        model.get_submodule(name).register_forward_hook(lambda m, i, out, block=block: inside.update({block: out}))
    subject = profile.Subject.of("e3nn", "fp32", model, 2)
    subject.call()
    kept = {block: out.detach().clone() for block, out in inside.items()}
    for block, run in profile.recorded(subject).items():
        out, wanted = run()
        assert wanted
        if block == "conv_tp":  # with the sum over edges
            want = torch.zeros(24, out.shape[1]).index_add_(0, subject.edge_index[1], kept[block])
        else:
            want = kept[block]
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_cast_linears_need_linears():
    with pytest.raises(RuntimeError, match="no linear of cuEquivariance"):
        profile.with_cast_linears(torch.nn.Linear(2, 2), torch.bfloat16)


def test_the_verdict_on_backends():
    def verdicts_of(wall):
        rows = [
            {"backend": b, "precision": p, "l": 2, "atoms": 192, "status": "ok", "wall": w, "ends": [w, w], "gpu": w}
            for b, p, w in (("e3nn", "fp32", 30.0), ("cueq", "fp32", wall), ("cueq", "bf16 linears", 9.0))
        ]
        return list(claims.verdicts({"profile": {"wholes": rows}}))

    assert verdicts_of(9.0)[0][2] == "confirmed"
    assert verdicts_of(15.0)[0][1:] == (
        "e3nn's wall time over cuEq's, both FP32 (and GPU time): l = 2, 192 atoms: 2.00 [2.00, 2.00] (2.00)",
        "not confirmed",
    )
    assert verdicts_of(9.0)[2][2] == "open"  # both kinds of linears are needed


def test_two_of_four_are_kept():
    w = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    kept = sparsity.pruned(w)
    for first in (0, 4):
        group, left = w[first : first + 4].abs(), kept[first : first + 4]
        assert ((left != 0).sum(0) == 2).all()
        assert torch.equal(left.abs().sort(0).values[2:], group.sort(0).values[2:])
    assert torch.equal(kept[8:], w[8:])


def test_a_pruned_model_is_sparse_on_every_backend():
    plain = load_water(device="cpu", dtype=torch.float64)
    masks = sparsity.linear_masks(plain)
    ours = sparsity.linear_masks(accelerate(load_water(device="cpu", dtype=torch.float64), "fp64"))
    assert masks.keys() == ours.keys()
    assert all(torch.equal(mask, ours[name]) for name, mask in masks.items())
    assert not any(name.startswith(("readouts", "node_embedding")) for name in masks)
    before = {name: p.clone() for name, p in plain.named_parameters()}
    sparsity.prune_linears(plain)
    for name, p in plain.named_parameters():
        want = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(p, want)
    assert all(mask.float().mean() == 0.5 for mask in masks.values())  # 64 channels: no rest
    with pytest.raises(ValueError, match="no linear between channels"):
        sparsity.linear_masks(torch.nn.Linear(2, 2))


def test_training_goes_on_with_the_mask(monkeypatch, reference_path):
    size = replace(training.QUICK, steps=4, every=4, train=2)
    data = training.taught("water", size, "cpu", True)
    architecture = training.architecture_of(data, size)
    seen = []
    monkeypatch.setattr(training, "errors_of", lambda plain, *_: seen.append(plain) or {"force_rmse": 1.0})
    for mode in training.SPARSE_MODES:
        training.train(mode, 1, data, architecture, size, torch.device("cpu"))
    zeros = [
        {
            name: float((dict(plain.named_parameters())[name] == 0).float().mean())
            for name in sparsity.linear_masks(plain)
        }
        for plain in seen
    ]
    assert max(zeros[0].values()) < 0.01
    assert set(zeros[1].values()) == {0.5}


@pytest.mark.skipif(not (torch.cuda.is_available() or dispatch.interpreting()), reason="Triton runs nowhere here")
def test_16_bit_sums_err_more_than_fp32_sums(monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(accumulation, "shapes", lambda atoms, edges: {"linear": (40, 192, 96)})
    words = ("bf16", "fp16") if device.type == "cuda" else ("fp16",)  # the interpreter is slow, and poor at bf16
    monkeypatch.setattr(accumulation, "WORDS", {word: accumulation.WORDS[word] for word in words})
    rows = [*accumulation.products(0, 0, device), *accumulation.tensor_products(2, 4, 1.1, device)]
    found = {(row["shape"], row["operands"], row["variant"]): row for row in rows}
    for shape in ("linear", "conv_tp, forward"):
        for word in words:
            single = found[shape, word, "this package's, fp32 sums"]
            short = found[shape, word, f"this package's, {word} sums"]
            assert single["error_of_sums"] < short["error_of_sums"] < 0.05
            assert single["error_of_sums"] < {"bf16": 2**-8, "fp16": 2**-11}[word]  # of the result, where it is stored
    if device.type == "cuda":
        assert ("linear", "fp16", "PyTorch's, 2:4 sparse") in found


def test_a_wrong_product_is_not_timed(monkeypatch):
    monkeypatch.setattr(accumulation, "on_gpu", lambda *_: pytest.fail("it is timed"))
    right = torch.ones(2, 2, dtype=torch.float64)
    for wrong in (1.1 * right, torch.full_like(right, torch.nan)):
        with pytest.raises(RuntimeError, match="sums of linear_up in fp16 is wrong"):
            accumulation.measured("sums of linear_up in fp16", lambda wrong=wrong: wrong, right, right)


def test_the_verdict_on_accumulators():
    def row(variant, ms, error):
        return {"shape": "linear_up", "operands": "fp16", "variant": variant, "ms": ms, "error": error}

    def verdicts_of(ms):
        rows = [row("this package's, fp32 sums", 1.0, 1e-4), row("this package's, fp16 sums", ms, 1e-3)]
        return list(claims.verdicts({"accumulation": {"rows": rows, "trained": []}}))[-2:]

    assert verdicts_of(0.99)[0][2] == "not confirmed"
    assert verdicts_of(0.8)[0][2] == "faster for linear_up, fp16"
    assert verdicts_of(0.8)[0][1].endswith("linear_up, fp16: 1.25 (0.001, 0.0001)")
    assert verdicts_of(0.8)[1][2] == "open"
    assert np.isclose(claims.PAYS, 1.05)
