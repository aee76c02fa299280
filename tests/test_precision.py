import json

import pytest
import torch

from mace_triton.certify import BUDGETS, budget_of
from mace_triton.precision import PRESETS, Precision


@pytest.mark.parametrize("name", ["fp64", "fp32", "tf32", "bf16", "fp16"])
def test_presets_parse_by_name(name):
    policy = Precision.parse(name)
    assert policy.name == name
    assert policy is PRESETS[name]
    assert Precision.parse(policy) is policy


def test_parameters_stay_in_fp32_or_fp64():
    assert PRESETS["fp64"].torch_dtype == torch.float64
    assert all(PRESETS[name].torch_dtype == torch.float32 for name in PRESETS if name != "fp64")


def test_presets_name_the_operand_precision():
    assert {name: policy.linear for name, policy in PRESETS.items()} == {
        "fp64": "fp64",
        "fp32": "tf32x3",
        "tf32": "tf32",
        "bf16": "bf16",
        "fp16": "fp16",
    }
    assert {policy.product for policy in PRESETS.values()} == {"fp64", "tf32x3", "tf32", "fp16"}
    assert PRESETS["bf16"].storage == torch.bfloat16
    assert PRESETS["tf32"].storage == torch.float32
    assert Precision("mine", "fp32", "bf16", "fp32").storage == torch.float32


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"fp64, fp32, tf32, bf16, fp16.*'fp8'"):
        Precision.parse("fp8")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (("x", "bf16", "ieee", "fp32"), "dtype"),
        (("x", "fp32", "int8", "fp32"), "linear"),
        (("x", "fp32", "ieee", "tf32"), "tensor_product"),
        (("x", "fp32", "fp64", "fp32"), "all be fp64"),
        (("x", "fp64", "fp64", "bf16"), "all be fp64"),
        (("x", "fp32", "ieee", "fp32", "fp8"), "radial"),
        (("x", "fp32", "ieee", "fp32", "ieee", "fp64"), "all be fp64"),
        (("x", "fp32", "ieee", "fp32", "ieee", "ieee", "tf32"), "contraction"),
        (("x", "fp32", "ieee", "fp32", "ieee", "ieee", "fp32", "tf32"), "features"),
        (("x", "fp32", "ieee", "fp32", "ieee", "ieee", "fp32", "fp32", "fp8"), "product"),
    ],
)
def test_inconsistent_policies_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        Precision(*fields)


def test_blocks_that_are_not_named_follow():
    policy = Precision("mine", "fp32", "bf16", "fp16")
    assert (policy.radial, policy.readout, policy.contraction, policy.features) == ("bf16", "tf32x3", "fp32", "fp32")
    assert policy.product == "bf16"
    assert PRESETS["fp64"] == Precision("fp64", *["fp64"] * 8)


def test_a_policy_has_a_file(tmp_path):
    policy = Precision("mine", "fp32", "bf16", "fp16", readout="tf32", features="bf16")
    policy.save(tmp_path / "mine.json")
    words = json.loads((tmp_path / "mine.json").read_text())
    assert words["features"] == "bf16"
    (tmp_path / "mine.json").write_text(json.dumps(words | {"found by": "a search"}))
    for path in (tmp_path / "mine.json", str(tmp_path / "mine.json")):
        assert Precision.parse(path) == policy


@pytest.mark.parametrize("text", [None, "no json", "[1]", "{}", '{"name": "x", "dtype": "fp32"}'])
def test_a_file_that_is_none_is_named(text, tmp_path):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json"):
        Precision.parse(path)


def test_budget_of_a_policy_is_that_of_its_least_exact_word():
    assert all(budget_of(policy) == BUDGETS[name] for name, policy in PRESETS.items())
    assert budget_of(Precision("mine", "fp32", "ieee", "bf16")) == BUDGETS["bf16"]
    assert budget_of(Precision("mine", "fp32", "tf32", "fp32")) == BUDGETS["tf32"]
    assert budget_of(Precision("fp32", "fp32", "ieee", "fp32", features="fp16")) == BUDGETS["fp16"]
    assert budget_of(Precision("mine", "fp32", "ieee", "fp32")) == BUDGETS["fp32"]
