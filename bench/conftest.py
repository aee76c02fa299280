"""Options, the fixture that makes rows, and the JSON file they go to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import measure, rows, timing

SIZES = ("tiny", "quick", "full")


def pytest_addoption(parser):
    group = parser.getgroup("mace_triton")
    group.addoption("--bench-size", choices=SIZES, help="tiny (default on a CPU), quick (default on a GPU) or full")
    group.addoption("--bench-results", type=Path, default=rows.RESULTS, help="folder for the JSON file")


def bench_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bench_size(config) -> str:
    return config.getoption("--bench-size") or ("quick" if bench_device().type == "cuda" else "tiny")


def pytest_generate_tests(metafunc):
    if "spec" in metafunc.fixturenames:
        metafunc.parametrize("spec", metafunc.module.specs(bench_size(metafunc.config)), ids=str)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return bench_device()


@pytest.fixture(scope="session")
def recorder(device, pytestconfig) -> rows.Recorder:
    header = rows.environment(device)
    header["size"] = bench_size(pytestconfig)
    header["copy_bandwidth_gb_per_s"] = round(timing.copy_bandwidth(device) / 1e9, 1)
    return rows.Recorder(rows.results_file(header, pytestconfig.getoption("--bench-results")), header)


@pytest.fixture
def bench_row(benchmark, recorder, device):
    """Measure a spec, record its row, and let pytest-benchmark time the same calls from the host's side."""

    def run(spec: measure.Spec) -> None:
        row = recorder.add(measure.measure(spec, device))
        if row["status"] == "missing" or (row["status"] != "ok" and not measure.is_ours(row)):
            pytest.skip(f"{row['status']}: {row['reason']}")
        if row["status"] != "ok":
            pytest.fail(f"{row['status']}: {row['reason']}")
        call = measure.prepared(spec, device).calls[spec.direction][0]
        benchmark.extra_info.update(row)
        benchmark.pedantic(lambda: (call(), timing.synchronize(device)), rounds=3, iterations=1)

    return run
