import pytest
import torch

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
    ],
)
def test_inconsistent_policies_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        Precision(*fields)
