"""The studies: statistics, structures, errors, the search, the report."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import ase.io
import mace  # noqa: F401  before e3nn
import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mace_triton as mt
from mace_triton import cli
from mace_triton.models import load_water
from mace_triton.precision import PRESETS, Precision
from mace_triton.study import claims, precision, report, search, store, structures, training
from mace_triton.water import water_box

pytestmark = pytest.mark.torchscript


def study(*words: str):
    return CliRunner().invoke(cli.app, ["study", *map(str, words)])


# Statistics


def test_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = store.interval(values, lambda drawn: drawn.mean(axis=-1))
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert low < mean < high
    assert store.interval(np.full(5, 2.0), store.root_mean_square) == (2.0, 2.0, 2.0)
    assert store.interval(np.array([2.0]), store.root_mean_square) == (2.0, None, None)
    few = np.array([1.0, 2.0, 4.0])
    assert store.mean_interval(few) == pytest.approx((7 / 3, 7 / 3 - 3.7947, 7 / 3 + 3.7947), abs=1e-3)
    assert store.mean_interval(few[:1]) == (1.0, None, None)


def test_command_names_files_and_no_place():
    words = ["study", "precision", "--data", "/somewhere/water.npz", "--out", "/elsewhere", "--quick"]
    assert store.command(words) == "mace-triton study precision --data water.npz --quick"


def test_results_come_back(tmp_path):
    store.save("search", tmp_path, torch.device("cpu"), rows=[{"ms": np.float64(1.5)}])
    found = store.load(tmp_path)["search"]
    assert found["rows"] == [{"ms": 1.5}]
    assert torch.__version__.startswith(found["environment"]["versions"]["torch"])  # which may lack "+cu130"
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json is no study's result"):
        store.load(tmp_path)


# Structures


@pytest.mark.parametrize("sample", structures.crystals(1), ids=lambda sample: sample.name)
def test_crystals_have_no_forces_by_symmetry(sample, reference_path):
    (atoms,) = sample.frames
    assert sample.still
    inverted = atoms.copy()
    for centre in atoms.positions:
        inverted.positions = 2 * centre - atoms.positions
        away = inverted.positions[:, None] - atoms.positions[None]
        fractions = away @ np.linalg.inv(atoms.cell.array)
        onto = (np.abs(fractions - fractions.round()) < 1e-9).all(-1)
        assert (onto & (atoms.numbers[:, None] == atoms.numbers[None])).any(1).all()
    plain = load_water(dtype=torch.float64)
    values = precision.by_engine(mt.accelerate(plain), sample.frames)
    assert np.abs(values.forces).max() < 1e-12


def test_held_out_frames_are_those_of_the_folder(tmp_path):
    folder = "data_3/set.000"
    box = water_box(2)
    positions = np.stack([box.positions + i for i in range(6)]).astype(np.float32)
    cells, split = np.tile(box.cell.array, (6, 1, 1)), np.array(["a", folder, folder, "a", folder, folder])
    np.savez(tmp_path / "d.npz", positions=positions, cell=cells, numbers=box.numbers, split=split)
    sample = structures.held_out(tmp_path / "d.npz", "water", 3)
    assert [round(float((atoms.positions - box.positions).mean())) for atoms in sample.frames] in ([1, 2, 5], [1, 4, 5])
    np.savez(tmp_path / "d.npz", positions=positions, cell=cells, numbers=box.numbers, split=np.full(6, "a"))
    with pytest.raises(ValueError, match="has no frames of data_3"):
        structures.held_out(tmp_path / "d.npz", "water", 3)


def test_displaced_atoms_differ_from_frame_to_frame():
    for sample in (structures.displaced(1, 2), structures.other_elements((31, 33), 1, 2)):
        one, two = sample.frames
        assert not np.allclose(one.positions, two.positions)
        assert (one.numbers == two.numbers).all()


# Errors and times


def test_errors_are_those_that_were_made():
    rng = np.random.default_rng(0)
    exact = precision.Values(rng.normal(size=4), rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 3, 3)))
    got = replace(exact, energy=exact.energy + 1e-3, forces=exact.forces.copy(), stress=exact.stress + 2e-3)
    got.forces[2, 1, 0] += 0.06
    found = precision.errors(got, exact, still=False)
    assert found["energy_rmse"] == pytest.approx((1.0, 1.0, 1.0))
    assert found["energy_bias"][0] == pytest.approx(1.0)
    assert found["stress_rmse"][0] == pytest.approx(2.0)
    assert found["force_max"] == pytest.approx(60.0)
    assert found["force_rmse"][0] == pytest.approx(60.0 / np.sqrt(60))
    assert found["one_minus_cosine"] > 1e-5
    assert precision.errors(exact, exact, still=False)["one_minus_cosine"] == pytest.approx(0, abs=1e-15)
    assert precision.errors(exact, exact, still=True)["one_minus_cosine"] is None


def test_a_reference_that_is_not_e3nns_is_refused(reference_path):
    plain = load_water(dtype=torch.float64)
    frames = (water_box(1),)
    values = precision.by_engine(mt.accelerate(plain), frames)
    assert precision.check_reference(plain, values, frames) < 1e-12
    with pytest.raises(RuntimeError, match="differs from e3nn"):
        precision.check_reference(plain, replace(values, forces=values.forces + 1e-6), frames)


def test_every_block_has_a_policy():
    names = [policy.name for policy in precision.policies()]
    assert len(set(names)) == len(names)
    for block, fields in precision.BLOCKS.items():
        policy = next(p for p in precision.policies() if p.name == f"{block} bf16")
        words = {key for key, word in asdict(policy).items() if word != asdict(PRESETS["fp32"])[key]}
        assert words == {"name", *fields}


FEW = [PRESETS["fp32"], PRESETS["bf16"], replace(PRESETS["fp32"], name="readout bf16", readout="bf16")]


def test_a_small_study_and_its_report(tmp_path, monkeypatch, reference_path):
    monkeypatch.setattr(precision, "policies", lambda quick: FEW)
    some = structures.crystals(1)[:1]
    monkeypatch.setattr(structures, "crystals", lambda copies: some)
    done = study("precision", "--model", "water", "--quick", "--device", "cpu", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    check_errors(store.load(tmp_path)["precision"])
    check_report(tmp_path, store.load(tmp_path)["precision"])


def check_errors(found: dict) -> None:
    water = {row["policy"]: row for row in found["rows"] if row["sample"] == "displaced water"}
    assert list(water) == ["fp32", "bf16", "readout bf16", precision.E3NN]
    for name, least, most in (("fp32", 1e-5, 0.1), ("bf16", 0.1, 20), (precision.E3NN, 1e-5, 0.1)):
        assert least < water[name]["force_rmse"][0] < most
        assert water[name]["force_rmse"][1] <= water[name]["force_rmse"][0] <= water[name]["force_rmse"][2]
    assert water["bf16"]["words"]["linear"] == "bf16"
    still = [row for row in found["rows"] if row["still"]]
    assert len(still) == 4
    assert all(row["largest_force"] < claims.STILL for row in still)
    assert {row["model"] for row in found["rows"]} == {"water", "small, random weights"}
    times = {row["policy"]: row for row in found["times"]}
    assert list(times) == [policy.name for policy in FEW]
    assert all(row["ms_ends"][0] <= row["ms"] <= row["ms_ends"][1] for row in times.values())
    assert times["readout bf16"]["by_autograd"]
    assert not times["bf16"]["by_autograd"]


def check_report(folder: Path, found: dict) -> None:
    """It shows what was measured, and the same results give the same page."""
    written = report.write(folder)
    assert [path.name for path in written] == ["README.md", "pareto.svg", "report.html"]
    text, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    row = next(r for r in found["rows"] if r["policy"] == "bf16" and r["sample"] == "displaced water")
    for shown in (text, page):
        assert f"{row['force_max']:.2g}" in shown
        assert "not measured yet" in shown
    assert "<svg" in page
    assert "pareto.svg" in text
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in report.write(folder)] == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("precision", "--model", "medium"), "--model: this study is of water"),
        (("precision", "--data", "none.npz"), "no such file: none.npz"),
        (("search", "water", "w.xyz", "--energy", "0"), "energy limit must be positive"),
        (("search", "water", "w.xyz", "--policy", "p.txt"), "a policy file ends in .json"),
        (("search", "water", "none.xyz"), "none.xyz"),
        (("report", "--out", "nowhere"), "no results in nowhere"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = study(*words)
    assert done.exit_code == 1
    (line,) = done.output.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


# Search


GAINS = {"linear": 3.0, "product": 0.0, "radial": 1.0, "tensor_product": 2.0, "contraction": 0.0, "features": 0.5}
PRICES = {"linear": 6.0, "product": 0.1, "radial": 1.0, "tensor_product": 2.0, "contraction": 0.1, "features": 0.1}


class Pretended:
    """Trials whose times and errors are known: each block has a price and a gain of its own."""

    def measure(self, policy: Precision, steps: int) -> dict:
        cheap = [field for field in search.CHOICES if getattr(policy, field) not in ("tf32x3", "fp32")]
        ms, force = (10 - sum(GAINS[field] for field in cheap), 0.01 + sum(PRICES[field] for field in cheap))
        return {"ms": ms, "ms_ends": [0.99 * ms, 1.01 * ms], "energy_rmse": 0.01, "force_rmse": force}

    def faster(self, policy: Precision, than: Precision, steps: int) -> bool:
        return self.measure(policy, steps)["ms"] < self.measure(than, steps)["ms"]


@pytest.mark.parametrize(
    ("force", "cheap"),
    [
        (100.0, {"linear", "radial", "tensor_product", "features"}),
        (4.0, {"radial", "tensor_product", "features"}),
        (1.5, {"radial", "features"}),
        (0.05, set()),
    ],
)
def test_search_finds_the_fastest_policy_allowed(force, cheap):
    """Blocks that gain nothing (contraction, product) stay exact."""
    found = search.descend(Pretended(), search.Limits(1.0, force), 1)
    assert {field for field in search.CHOICES if getattr(found, field) not in ("tf32x3", "fp32")} == cheap


def test_search_refuses_what_fp32_cannot_do():
    with pytest.raises(ValueError, match=r"less than the errors of fp32, 0\.01 and 0\.01"):
        search.descend(Pretended(), search.Limits(1.0, 0.001), 1)


def test_a_time_that_does_not_come_again_is_no_gain():
    """One policy seems fast when it is measured first, and is not beside another."""

    class Lucky(Pretended):
        def measure(self, policy: Precision, steps: int) -> dict:
            row = super().measure(policy, steps)
            return row | ({"ms": 0.1} if policy.contraction == "bf16" else {})

        def faster(self, policy: Precision, than: Precision, steps: int) -> bool:
            return Pretended.measure(self, policy, steps)["ms"] < Pretended.measure(self, than, steps)["ms"]

    found = search.descend(Lucky(), search.Limits(1.0, 100.0), 1)
    assert found.contraction == "fp32"
    assert found.features != "fp32"


def test_policies_are_timed_by_turns(monkeypatch, reference_path):
    plain, atoms = load_water(dtype=torch.float64), water_box(1)
    trials = search.Trials(plain, [(atoms,)], atoms, Console(quiet=True))
    times = iter([(2.0, 2.0, 2.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (0.9, 0.9, 0.9), (1.0, 1.0, 1.0)])
    monkeypatch.setattr(search, "milliseconds", lambda *_: next(times))
    assert trials.faster(PRESETS["bf16"], PRESETS["fp32"], 1)  # 2, 0.5 and 0.9 of the time: 0.9 in the middle
    times = iter([(0.995, 0.995, 0.995), (1.0, 1.0, 1.0)] * 3)
    assert not trials.faster(PRESETS["bf16"], PRESETS["fp32"], 1)


def test_search_writes_a_policy_that_runs(tmp_path, monkeypatch, reference_path):
    monkeypatch.setattr(search, "CHOICES", {"tensor_product": ("fp32", "bf16")})
    monkeypatch.setattr(search, "PRESETS", {"fp32": PRESETS["fp32"]})
    times = iter((2.0, 1.0, *(1.0, 2.0) * (2 * search.TURNS)))  # to win, and to keep what was won
    monkeypatch.setattr(search, "milliseconds", lambda *_: 3 * [next(times)])
    ase.io.write(tmp_path / "w.xyz", [water_box(1, seed=seed) for seed in range(3)])
    policy = tmp_path / "mine.json"
    done = study("search", "water", tmp_path / "w.xyz", "--quick", "--policy", policy, "--out", tmp_path / "s")
    assert done.exit_code == 0, done.output
    found = Precision.parse(policy)
    assert found == replace(PRESETS["fp32"], name="mine", tensor_product="bf16")
    document = store.load(tmp_path / "s")["search"]
    assert document["quick"]
    assert [row["words"]["tensor_product"] for row in document["rows"]] == ["fp32", "bf16"]
    assert document["found"]["force_rmse"] > 10 * document["rows"][0]["force_rmse"] > 0
    calculator = mt.MACETritonCalculator("water", precision=str(policy), device="cpu")
    assert calculator.models[0].interactions[1].conv_tp.run_storage == "bf16"
    assert calculator.certify(water_box(2)).passed


def test_frames_of_other_atoms_are_told_apart():
    from mace_triton.study.app import grouped

    frames = [water_box(1), water_box(2), water_box(1, seed=3)]
    assert [[len(atoms) for atoms in group] for group in grouped(frames)] == [[3, 3], [24]]


# Report


def test_verdicts_follow_the_figures():
    times = [{"policy": name, "atoms": 8, "ms": ms, "ms_ends": [ms, ms]} for name, ms in (("fp32", 4.0), ("bf16", 1.5))]
    still = {"policy": "bf16", "sample": "fcc", "still": True, "largest_force": 2e-4}

    def verdict_of(row, times=times):
        lines = claims.verdicts({"precision": {"times": times, "rows": [row]}})
        return [verdict for _, _, verdict in lines]

    assert verdict_of(still) == [*["open", "not confirmed"], *["open"] * 3, "confirmed for bf16", *["open"] * 2]
    assert verdict_of(still | {"largest_force": 1e-6})[5] == "not confirmed: all below 0.0001"
    assert verdict_of(still, [times[0], times[1] | {"ms": 0.9, "ms_ends": [0.9, 0.9]}])[1] == "confirmed"
    assert [verdict for _, _, verdict in claims.verdicts({})] == ["open"] * 8


# Training


def test_stochastic_rounding_is_right_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0 + 2**-9, -(1.0 + 2**-10), 3.1415926, -1e-6, 0.0, 1.0])
    draws = torch.stack([training.at_random(values, torch.bfloat16, generator) for _ in range(4000)])
    assert torch.equal(draws, draws.bfloat16().float())
    neighbours = values.bfloat16().float()
    ulp = torch.ldexp(torch.ones(6), values.abs().clamp_min(1e-30).log2().floor().int() - 7)
    assert ((draws - values).abs() < ulp).all()
    spread = ulp / 2 / 4000**0.5
    assert ((draws.mean(0) - values).abs() <= 5 * spread).all()
    assert torch.equal(draws[:, -2:], neighbours[-2:].expand(4000, 2))
    with pytest.raises(TypeError, match="float32 to bfloat16"):
        training.at_random(values.double(), torch.bfloat16, generator)


@pytest.mark.parametrize("mode", [m for m in training.MODES if m.weights != "fp32"], ids=lambda mode: mode.name)
def test_weights_are_stored_as_the_mode_says(mode):
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    start = [p.detach().clone() for p in layer.parameters()]
    training.Storage(mode, layer, optimizer, seed=0)
    dtype = training.SIXTEEN[mode.weights]
    for _ in range(200):
        optimizer.zero_grad()
        sum(p.sum() for p in layer.parameters()).backward()
        optimizer.step()
        assert all(torch.equal(p, p.to(dtype).float()) for p in layer.parameters())
    moved = torch.cat([(a - b).ravel() for a, b in zip(start, layer.parameters(), strict=True)]).mean().item()
    if mode.masters or mode.stochastic:  # steps far below the spacing of the weights add up
        assert moved == pytest.approx(200 * 1e-4, rel=0.25)
    else:
        assert moved < 0.5 * 200 * 1e-4 or mode.weights == "fp16"


@pytest.mark.parametrize(
    ("words", "message"), [(("--workers", "0"), "--workers must be at least 1"), (("--seeds", "1;2"), "--seeds takes")]
)
@pytest.mark.parametrize("name", ["training", "accumulation"])
def test_options_of_trainings_that_cannot_be(name, words, message):
    done = study(name, *words, "--device", "cpu")
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())


def test_trainings_are_dealt_out_to_all_gpus(monkeypatch):
    def pretended(mode, seed, *rest):
        time.sleep(0.02 if seed == 1 else 0.0)  # the first ends last
        return {"mode": mode.name, "seed": seed, "device": rest[-1]}

    monkeypatch.setattr(training, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(training, "attempt", pretended)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    todo = [(mode, seed) for seed in (1, 2) for mode in training.MODES[:2]]
    for device, places in (("cuda", ("cuda:0", "cuda:1")), ("cuda:1", ("cuda:1",)), ("cpu", ("cpu",))):
        rows = dict(training.trainings(todo, 2, device))
        assert [rows[n] for n in range(4)] == [
            {"mode": mode.name, "seed": seed, "device": places[n % len(places)]} for n, (mode, seed) in enumerate(todo)
        ]


def test_a_small_training_study(tmp_path, monkeypatch, reference_path):
    names = ("fp32", "bf16 weights", "autocast bf16")
    monkeypatch.setattr(training, "QUICK", replace(training.QUICK, steps=4, every=4, train=2))
    monkeypatch.setattr(training, "MODES", tuple(mode for mode in training.MODES if mode.name in names))
    right = training.train

    def failing(mode, seed, *rest):
        if mode.name == "autocast bf16" and seed == 2:
            raise RuntimeError("no kernel for this")
        return right(mode, seed, *rest)

    monkeypatch.setattr(training, "train", failing)
    done = study("training", "--model", "water", "--quick", "--device", "cpu", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = store.load(tmp_path)["training"]
    rows = {(row["mode"], row["seed"]): row for row in found["rows"]}
    assert set(rows) == {(name, seed) for name in names for seed in (1, 2)}
    assert rows["autocast bf16", 2]["reason"] == "no kernel for this"
    for seed in (1, 2):
        single, stored = (rows[name, seed]["force_rmse"] for name in names[:2])
        assert [point["step"] for point in rows["fp32", seed]["curve"]] == [4]
        assert rows["fp32", seed]["curve"][-1]["force_rmse"] == single
        assert single != stored
    about = {key: found[key] for key in ("model", "steps", "batch", "quick")}
    assert store.earlier(tmp_path / "training.json", about) == found["rows"]
    assert store.earlier(tmp_path / "training.json", about | {"steps": 5}) == []
    assert not any(training.of_another_policy(row) for row in found["rows"])
    assert training.of_another_policy(rows["fp32", 1] | {"words": PRESETS["bf16"].words})
    assert training.of_another_policy(rows["fp32", 1] | {"mode": "fp8", "words": {}})
    older = {key: value for key, value in rows["fp32", 1].items() if key != "words"}
    assert not training.of_another_policy(older)
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| bf16 weights |" in text
    assert (tmp_path / "training.svg").is_file()


def test_the_verdict_on_weights_needs_seeds():
    def row(mode, seed, force):
        return {"mode": mode, "seed": seed, "status": "ok", "force_rmse": force}

    modes = [mode.name for mode in training.MODES if mode.weights != "fp32"]
    rows = [row("fp32", seed, 20 + seed) for seed in range(4)]
    for n, mode in enumerate(modes):
        rows += [row(mode, seed, (20 + seed) * (1.2 if n == 0 else 1.0) * (1 + 1e-3 * seed)) for seed in range(4)]
    (line,) = [line for line in claims.verdicts({"training": {"rows": rows}}) if line[0].startswith("weights")]
    assert line[2].startswith("bf16 weights: yes; fp16 weights: no")
    one = [r for r in rows if r["seed"] == 0]
    (line,) = [line for line in claims.verdicts({"training": {"rows": one}}) if line[0].startswith("weights")]
    assert line[2] == "open"


def test_the_page_in_docs_is_that_of_its_results(tmp_path):
    folder = Path(__file__).parents[1] / store.FOLDER
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    report.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()
