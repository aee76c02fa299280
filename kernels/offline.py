"""Compile kernels for a GPU that is not there, and read what they use: registers, stack, shared memory, spills.

    compile_offline(kernel, signature, constexprs, "sm_90", num_warps=4, num_stages=1) -> CompiledStats

Under TRITON_INTERPRET=1 the jit functions of this process cannot be compiled, so the work is done in a child process
that imports the kernel's file without the interpreter. A kernel module offers `offline_cases()`, a list of `Case`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FOLDER = Path(__file__).parent
PACKAGE = "_offline_kernels"
OPCODES = re.compile(r"\b(wgmma\.mma_async|mma\.sync|cp\.async|v_mfma|fma\.rn\.f32|bar\.sync|s_barrier)")


@dataclass(frozen=True)
class Case:
    """One specialisation: `name` for people, `kernel` the name of a jit function in kernels/<module>.py.

    `module` may also be the path of a generated source file.
    """

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict
    num_warps: int = 4
    num_stages: int = 1
    divisible: tuple[str, ...] = ()  # arguments known to be multiples of 16


@dataclass(frozen=True)
class CompiledStats:
    """Per thread: registers, stack bytes, spilled bytes (AMD: registers). Per block: shared bytes. Opcode counts.

    carried: variables that the loops carry from turn to turn, by Triton's own representation.
    """

    target: str
    registers: int
    stack: int
    shared: int
    spills: int
    instructions: dict[str, int] = field(default_factory=dict)
    carried: int = 0


def gpu_target(name: str) -> GPUTarget:
    """ "sm_90", "sm_80", ... or "gfx942", ... as Triton's target; ValueError for another form."""
    if re.fullmatch(r"sm_\d+", name):
        return GPUTarget("cuda", int(name[3:]), 32)
    if re.fullmatch(r"gfx\w+", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target must look like 'sm_90' or 'gfx942', got {name!r}")


def compile_offline(
    kernel,
    signature: dict[str, str],
    constexprs: dict,
    target: str,
    num_warps: int = 4,
    num_stages: int = 1,
    divisible: tuple[str, ...] = (),
) -> CompiledStats:
    """Compile one jit function of this package for `target` ("sm_90", "gfx942", ...).

    signature: argument name -> Triton type ("*fp32", "i32"), constexprs: the others. Raises RuntimeError with the
    compiler's message when it does not compile.
    """
    function = kernel.fn
    module = function.__module__.rpartition(".")[2]
    case = Case(function.__name__, module, function.__name__, signature, constexprs, num_warps, num_stages, divisible)
    return compile_cases([case], target)[case.name]


def compile_cases(cases: Iterable[Case], target: str) -> dict[str, CompiledStats]:
    """Compile many cases in one child process: case name -> CompiledStats. Raises RuntimeError if one fails."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    job = pickle.dumps({"target": target, "cases": [asdict(case) for case in cases]})
    done = subprocess.run([sys.executable, str(FOLDER / "offline.py")], input=job, env=env, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stderr.decode()[-4000:]}")
    return {name: CompiledStats(**stats) for name, stats in json.loads(done.stdout.splitlines()[-1]).items()}


def compile_case(kernel, case: Case, target: str) -> CompiledStats:
    """Compile one case in this process, which must not run the interpreter."""
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in case.constexprs.items()}, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=gpu_target(target), options=options)
    text = compiled.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    found = dict(Counter(OPCODES.findall(text)))
    carried = sum(loop.count("=") for loop in re.findall(r"scf\.for .*iter_args\((.*?)\)", compiled.asm["ttir"]))
    if target.startswith("gfx"):
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
        return CompiledStats(
            target,
            numbers["vgpr_count"],
            numbers["private_segment_fixed_size"],
            compiled.metadata.shared,
            numbers["vgpr_spill_count"],
            found,
            carried,
        )
    usage = resource_usage(compiled.asm["cubin"])
    registers, stack, spills = (usage[key] for key in ("REG", "STACK", "LOCAL"))
    return CompiledStats(target, registers, stack, compiled.metadata.shared, spills, found, carried)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a cubin, from `cuobjdump -res-usage`. Spilled registers show as STACK."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _load(module: str) -> types.ModuleType:
    """kernels/<module>.py under a package name of its own: what lies around this folder is not imported."""
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        generated = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(generated)
        return generated
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{module}")


def main() -> None:
    """Child process: pickled cases on stdin, statistics as JSON on stdout."""
    job = pickle.load(sys.stdin.buffer)
    cases = [Case(**{**case, "divisible": tuple(case["divisible"])}) for case in job["cases"]]
    stats = {}
    for case in cases:
        try:
            stats[case.name] = compile_case(getattr(_load(case.module), case.kernel), case, job["target"])
        except Exception as error:  # a compiler's errors have many types
            raise SystemExit(f"{case.name} does not compile for {job['target']}: {error}") from error
    print(json.dumps({name: asdict(value) for name, value in stats.items()}))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its file names must not shadow other modules
    main()
