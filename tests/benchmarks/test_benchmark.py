"""The benchmarks: what they write, what they count, that their ways do the same, and what they refuse to time."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import benchmark_gpu
import benchmark_models
import harness
import pytest
import references
import roofline
import torch
from benchmark_models import AUTOENCODER_STAGES, GENERATOR_STAGES, SIZES, STAGES, Settings, make_stages
from emulation.toolchain import find_compiler
from harness import CPU, REFERENCE, Case, Row, Timing, difference, peak_memory_mb
from roofline import Peak, Work, count_operations
from torch import nn
from tqdm.auto import tqdm

import gpstoken_diffusers
from gpstoken_diffusers.ops.backend.native import BACKEND_VARIABLE, library, reference_forced
from gpstoken_diffusers.ops.splat import splat_gaussians

BACKEND = "native" if library("cpu") else REFERENCE
QUICK = ["--quick", "--rounds", "1", "--threads", "1", "--backend", BACKEND]
PEERS = ("AutoencoderKL (SDXL)", "AutoencoderDC (f32c32)", "AutoencoderTiny")


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """--backend sets a variable of the process."""
    monkeypatch.setenv(BACKEND_VARIABLE, os.environ.get(BACKEND_VARIABLE, ""))


def run_models(*arguments: object) -> int:
    return harness.main(lambda: benchmark_models.run([*QUICK, *map(str, arguments)]))


def toys(size: str, dtype: torch.dtype = torch.float32, **settings) -> dict[str, Case]:
    """The stages of a toy, by name; two pictures at once."""
    cases = make_stages(size, STAGES, Settings(CPU, [dtype], **{"batch_size": 2, "toy": True, **settings}))
    return {case.labels["stage"].split(",")[0]: case for case in cases}


def ours(case: Case):
    return next(iter(case.ways.values()))


# ---- the command ----


def test_the_report(tmp_path, capsys):
    folder = tmp_path / "made" / "on the way"
    sizes = ["--sizes", "l256", "mini", "xl", "--peers", "--dtype", "bfloat16", "float32"]
    assert run_models(*sizes, "--skip_memory", "--output", folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["plot.png", "results.json", "results.md"]
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    text, printed = (folder / "results.md").read_text(encoding="utf-8"), capsys.readouterr()
    assert text in printed.out and "toy networks" in text and "TOP/s" in text
    assert ("native, " if BACKEND == "native" else "without native code") in text
    assert "mini, sampling, 20 steps" in printed.err and "38/38" in printed.err  # the progress bar
    own, peers = text.split("## What else there is")
    assert "| size | stage | ours, bfloat16 | ours, float32 | reference |" in own and "Autoencoder" not in own
    assert "| size | stage | bfloat16 | float32 |" in peers
    for part, count in ((own, 16), (peers, 3)):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + count and len({line.count("|") for line in lines}) == 1

    document = json.loads((folder / "results.json").read_text())
    stages = [(size, name) for size in ("l256", "mini") for name in AUTOENCODER_STAGES]
    expected = stages + [(size, name) for size in ("mini", "xl") for name in GENERATOR_STAGES]
    expected += [(name, "encode + decode") for name in PEERS]
    assert sorted((row["size"], row["stage"].split(",")[0]) for row in document["rows"]) == sorted(expected)
    assert document["best_operations_per_s"]["float32"] > 0 and min(document["copy_bytes_per_s"].values()) > 0
    for row in document["rows"]:
        ways = ["ours, bfloat16", "ours, float32", REFERENCE] if row["size"] in SIZES else ["bfloat16", "float32"]
        for way in ways:
            values = row[way]
            assert len(values["seconds"]) == 1 and values["median_s"] > 0 and values["moved_bytes"] > 0
            assert values["peak_memory_mb"] is None
            assert values["share"] == pytest.approx(values["floor_s"] / values["median_s"])
            assert values["times_as_fast"] == pytest.approx(row[ways[-1]]["median_s"] / values["median_s"])
            assert (values["operations"] == 0) == (row["stage"] == "partition")
        if row["stage"] not in ("partition", "splat"):  # bfloat16 has 8 bits: an error of a hundredth or so, not none
            assert 1e-4 < row[ways[0]]["difference"] < 0.2


def test_what_is_missing_costs_only_its_part(monkeypatch, tmp_path, capsys):
    """matplotlib, or the process that measures memory."""

    def fail(command, way):
        raise RuntimeError("exit code -9: ")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(harness, "memory_in_fresh_process", fail)
    assert run_models("--sizes", "l256", "--stages", "splat", "--output", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
    error = capsys.readouterr().err
    assert "pip install matplotlib" in error and "could not be measured: exit code -9" in error


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler, which torch.compile needs on a CPU")
def test_compiled(tmp_path):
    """Each stage is one graph; operations are counted as without compiling."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    documents = []
    for extra in ([], ["--compile", "default"]):
        stages = ["--sizes", "mini", "--stages", "stem", "network", "--dtype", "float32", "--skip_memory"]
        assert run_models(*stages, *extra, "--output", tmp_path) == 0
        documents.append(json.loads((tmp_path / "results.json").read_text()))
    assert "ours compiled (default)" in (tmp_path / "results.md").read_text(encoding="utf-8")
    for before, own in zip(*(document["rows"] for document in documents), strict=True):
        assert own["ours, float32"]["operations"] == before["ours, float32"]["operations"] > 0
        assert own["ours, float32"]["difference"] < 1e-4  # float32 in another order
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds: expected a whole number of at least 1, got '0'"),
        (["--batch_size", "two"], "--batch_size: expected a whole number of at least 1, got 'two'"),
        (["--sizes", "huge"], "invalid choice: 'huge'"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees "),
        (["--device", "banana"], "--device banana: expected cpu, cuda or cuda:N."),
        (["--device", "meta"], "--device meta: expected cpu, cuda or cuda:N."),
        (["--sizes", "xl", "--stages", "splat"], "nothing to measure: xl has no stage splat."),
        (["--output", __file__], "benchmark: error: "),  # a file where a folder should be
    ],
)
def test_mistakes_are_explained_before_anything_is_measured(arguments, message, capsys, tmp_path):
    try:
        code = run_models("--output", tmp_path / "results", *arguments)
    except SystemExit as stopped:  # argparse's own
        code = stopped.code - 1
    assert code == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


# ---- which package, which backend ----


def test_plain_code_is_never_called_native(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(BACKEND_VARIABLE, REFERENCE)
    assert run_models("--backend", "native", "--output", tmp_path / "results") == 1
    error = capsys.readouterr().err
    assert "expected the native cpu library, but there is none: switched off by" in error and "pip install" in error
    assert not (tmp_path / "results").exists()


def test_the_command_of_the_package(tmp_path):
    """In a checkout it runs the benchmark; in an installed package it says where the benchmarks are."""
    package = tmp_path / "gpstoken_diffusers"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(Path(gpstoken_diffusers.__file__).parent / "benchmark.py", package)
    command = [sys.executable, "-m", "gpstoken_diffusers.benchmark", "--an_option"]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "are in the repository" in done.stderr
    script = tmp_path / "tests" / "benchmarks" / "benchmark_models.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; sys.exit(3 if sys.argv[1:] == ['--an_option'] else 4)")
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 3


def test_parts_of_the_run_on_a_gpu_are_commands(tmp_path):
    for part in benchmark_gpu.parts(tmp_path).values():
        first, *others = part.arguments
        if first == "-m":
            assert others[0] == "pytest" and os.path.isdir(others[-1])
        else:
            assert os.path.isfile(first)
        if first.endswith("benchmark_models.py"):
            assert benchmark_models.build_parser().parse_args(others).device == "cuda"


def test_a_part_that_fails_says_so_in_its_log(tmp_path, capfd):
    arguments = ["-c", "import os; print('part', os.environ['PART']); raise SystemExit(int(os.environ['PART']))"]
    for number in (0, 3):
        part = benchmark_gpu.Part(arguments, {"PART": str(number)})
        assert benchmark_gpu.run(f"part-{number}", part, tmp_path) == (number == 0)
        assert (tmp_path / f"part-{number}.log").read_text() == f"part {number}\n"
        assert f"part {number}\n" in capfd.readouterr().out


# ---- memory ----


def test_memory():
    """A call holds 256 MB for a moment, and 4 MB when it is done; a fresh process measures its own cases."""
    command = [benchmark_models.__file__, *QUICK, "--sizes", "mini", "--stages", "stem", "splat"]
    found = harness.memory_in_fresh_process(command, REFERENCE)
    assert len(found) == 2
    if sys.platform == "linux":
        assert all(0 <= value < 1000 for value in found)
        assert 250 < peak_memory_mb(lambda: (torch.ones(64, 2**20).sum(0)[:1],), CPU) < 300


# ---- the ways ----


@pytest.mark.parametrize("size", SIZES)
def test_references_compute_the_same(size):
    """In float32 they differ by the order of sums: 6e-8 each, over some twenty layers that each may double it."""
    for name, case in toys(size).items():
        expected = case.ways[REFERENCE]()
        assert difference(ours(case)(), expected) < 2e-5, name
        assert not math.isnan(sum(result.double().sum().item() for result in expected)), name


@pytest.mark.parametrize("before", [None, "auto", "reference"])
def test_references_run_without_native_code_and_give_the_environment_back(monkeypatch, before):
    def decoder(*_):
        seen.append(reference_forced())
        raise KeyError

    case, seen = toys("l256")["decoder"], []
    monkeypatch.setattr(references, "decoder", decoder)
    monkeypatch.delenv(BACKEND_VARIABLE)
    if before is not None:
        monkeypatch.setenv(BACKEND_VARIABLE, before)
    with pytest.raises(KeyError):
        case.ways[REFERENCE]()
    assert seen == [True] and os.environ.get(BACKEND_VARIABLE) == before


def test_sampling_saves_the_half_that_guidance_does_not_need():
    """Of eight steps those at t = 0 and 1/8 are below the interval: 14 evaluations of a sample instead of 16."""
    case = toys("xl", sampling_steps=8)["sampling"]
    assert count_operations(ours(case))[0] / count_operations(case.ways[REFERENCE])[0] == pytest.approx(14 / 16)


def test_a_wrong_answer_is_seen():
    right = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert difference([right], [right]) == 0
    assert difference([right, right + right.std(correction=0)], [right, right]) == pytest.approx(1, rel=1e-6)
    assert math.isnan(difference([right * math.nan, right], [right, right]))
    assert difference([torch.full((3,), 2)], [torch.ones(3)]) == 1  # nothing to divide by
    with pytest.raises(ValueError, match="different shapes"):
        difference([right[:50]], [right])


# ---- counts and clocks ----


def test_operations_and_bytes():
    """On an 11 x 11 map pixels are 0.2 apart: boxes of half a width 0.3 and 0.5 at the centre hold 3 x 5 of them."""
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    operations, result = count_operations(lambda: convolution(torch.zeros(2, 3, 10, 12)))
    assert operations == 2 * (2 * 10 * 12) * 8 * (3 * 9) and result.shape == (2, 8, 10, 12)
    assert count_operations(lambda: torch.zeros(5, 7) @ torch.zeros(7, 11))[0] == 2 * 5 * 7 * 11
    geometry = torch.tensor([[[0.1, 0.5 / 3, 0.0, 0.0, 0.0], [0.1, 0.1, 0.0, -1.0, -1.0]]])
    assert roofline.pairs_in_boxes(geometry, 11, 11, support=3.0) == 3 * 5 + 2 * 2  # the other is cut off by a corner
    splat = count_operations(lambda: splat_gaussians(geometry, torch.ones(1, 2, 4), 11, 11))
    assert splat[0] == 19 * (roofline.WEIGHT_OPERATIONS + 2 * 4)
    layer = nn.Linear(3, 4)
    assert roofline.weight_bytes([layer, layer], torch.bfloat16) == 2 * (12 + 4)
    assert roofline.tensor_bytes([torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64)]) == 48 + 40
    cases = toys("xl", torch.bfloat16, batch_size=1, sampling_steps=3)
    (network, network_reference), (sampling, _) = (cases[name].read_bytes.values() for name in ("network", "sampling"))
    inputs = 2 * 6 * (9 + 5) * 4  # two rows of six tokens: latents of nine channels, layouts of five
    # Sampling reads one row of each, and the weights in every step; bfloat16 has half the bytes.
    assert sampling - inputs // 2 == 3 * (network - inputs) and network_reference - inputs == 2 * (network - inputs)


ROUTES = {torch.float32: {"product": 208e9, "packed linear": 490e9}, torch.int8: {"convolution": 1.96e12}}
PEAK = Peak(ROUTES, {10**6: 4e11, 10**8: 1e11, 10**9: 2e11})


def test_the_floor_is_the_longer_time_of_the_best_route():
    assert PEAK.floor_s(Work(980 * 10**9, 10**6), torch.float32) == 2  # by the packed linear
    # Copies of no more bytes than the work, and larger ones where these are faster; the smallest for what is smaller.
    for size, speed in ((1, 4e11), (10**7, 4e11), (10**8, 2e11), (10**12, 2e11)):
        assert PEAK.floor_s(Work(0, size), torch.float32) == size / speed
    second = Peak({torch.float32: {"product": 300e9, "packed linear": 400e9}}, {10**6: 5e11})
    better = PEAK.best(second)  # of two measurements
    assert better.routes[torch.float32] == {"product": 300e9, "packed linear": 490e9} and better.copies[10**6] == 5e11


def test_no_route_has_a_share_above_the_whole():
    for dtype, routes in ROUTES.items():
        for speed in routes.values():
            row = Row("", {}, {"way": Timing((1e12 / speed,))}, {}, {"way": Work(10**12, 1)}, {"way": dtype})
            assert row.share("way", PEAK) == pytest.approx(speed / max(routes.values())) and row.share("way", PEAK) <= 1
            assert "too low" not in harness.report(None, "", [], [row], PEAK)
            row.timings = {"way": Timing((0.9e12 / max(routes.values()),))}
            assert "too low" in harness.report(None, "", [], [row], PEAK)  # 111%: the device's best is higher


def test_the_best_is_measured_by_every_route_that_there_is():
    routes = roofline.measure_peak(CPU, [torch.float32], small=True).routes
    packs = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    assert set(routes[torch.float32]) == {"product", "convolution"} | ({"packed linear"} if packs else set())
    assert all(speed > 0 for own in routes.values() for speed in own.values())


def test_ways_take_turns():
    order, runs = [], {name: lambda name=name: order.append(name) for name in ("reference", "ours")}
    with tqdm(total=3) as progress:
        seconds = harness.alternate(runs, 3, {"reference": 1.0, "ours": 0.04}, CPU, progress)
    ours = ["ours"] * 2  # two calls of 0.04 s fit into the shortest round
    assert order == ["reference", *ours, *ours, "reference", "reference", *ours]
    assert all(len(values) == 3 for values in seconds.values())
    timing = Timing((3.0, 1.0, 2.0, 5.0, 4.0))
    assert (timing.median, timing.quartiles, Timing((7.0,)).quartiles) == (3, (2, 4), (7, 7))
    assert [str(Timing((s,))) for s in (2.0, 0.002, 2e-6)] == ["2 s (2–2)", "2 ms (2–2)", "2 µs (2–2)"]
