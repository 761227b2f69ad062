"""`python -m gpstoken_diffusers.benchmark`: what it writes, what it counts, and that its two ways do the same."""

from __future__ import annotations

import json
import math
import os
import sys

import benchmark_gpu
import pytest
import torch
from emulation.toolchain import find_compiler
from torch import nn

from gpstoken_diffusers.benchmark import __main__ as command
from gpstoken_diffusers.benchmark import twins
from gpstoken_diffusers.benchmark.harness import memory_in_fresh_process
from gpstoken_diffusers.benchmark.measure import Timing, alternate, difference, peak_memory_mb
from gpstoken_diffusers.benchmark.report import plot_advice
from gpstoken_diffusers.benchmark.roofline import (
    WEIGHT_OPERATIONS,
    Peak,
    Work,
    count_operations,
    pairs_in_boxes,
    tensor_bytes,
    weight_bytes,
)
from gpstoken_diffusers.benchmark.stages import (
    AUTOENCODER_STAGES,
    GENERATOR_STAGES,
    SIZES,
    STAGES,
    WAYS,
    Settings,
    make_stages,
)
from gpstoken_diffusers.ops.backend.native import BACKEND_VARIABLE, reference_forced
from gpstoken_diffusers.ops.splat import splat_gaussians

CPU = torch.device("cpu")
QUICK = ["--quick", "--rounds", "1", "--threads", "1"]


def toys(size: str, dtype: torch.dtype = torch.float32, batch_size: int = 2, steps: int | None = None) -> dict:
    """The stages of a toy, by name."""
    settings = Settings(CPU, dtype, batch_size, steps, toy=True)
    return {stage.name: stage for stage in make_stages(size, STAGES, settings)}


# ---- the command ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, what was printed) of a toy run in float32."""
    folder = tmp_path_factory.mktemp("benchmark") / "made" / "on the way"
    arguments = [*QUICK, "--sizes", "l256", "mini", "xl", "--dtype", "float32", "--skip_memory"]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
        assert command.main([*arguments, "--output", str(folder)]) == 0
    return folder, "\n".join(printed)


def test_json_has_every_stage(run):
    document = json.loads((run[0] / "results.json").read_text())
    expected = [("l256", name) for name in AUTOENCODER_STAGES]
    expected += [("mini", name) for name in STAGES] + [("xl", name) for name in GENERATOR_STAGES]
    assert [(row["size"], row["stage"]) for row in document["rows"]] == expected
    assert document["dtype"] == "float32" and document["batch_size"] == 1 and document["toy"] is True
    assert document["matrix_product_flop_per_s"]["float32"] > 0 and document["copy_bytes_per_s"] > 0
    for row in document["rows"]:
        for way in WAYS:
            values = row[way]
            assert len(values["seconds"]) == 1 and values["median_s"] > 0 and values["moved_bytes"] > 0
            assert values["floor_s"] > 0 and values["peak_memory_mb"] is None
            assert values["share_of_roofline"] == pytest.approx(values["floor_s"] / values["median_s"])
        assert row["times_as_fast"] == pytest.approx(row["twin"]["median_s"] / row["ours"]["median_s"])
        assert (row["ours"]["operations"] == 0) == (row["stage"] == "partition")


def test_table_is_written_and_printed(run):
    folder, printed = run
    table = (folder / "results.md").read_text(encoding="utf-8")
    assert table in printed
    assert "toy networks" in table and "the twin in float32" in table and "TFLOP/s" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(AUTOENCODER_STAGES) + len(STAGES) + len(GENERATOR_STAGES)
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith("| mini | sampling, 20 steps |") for line in lines)


def test_plot_is_a_picture(run):
    assert (run[0] / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run[0].iterdir()) == ["plot.png", "results.json", "results.md"]


def test_without_matplotlib_the_table_is_written_and_the_plot_explained(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in plot_advice()
    arguments = ["--sizes", "l256", "--stages", "splat", "--skip_memory", "--output", str(tmp_path)]
    assert command.main([*QUICK, *arguments]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
    assert "pip install matplotlib" in capsys.readouterr().err


def test_peers_have_a_table_of_their_own(tmp_path):
    arguments = ["--sizes", "m128", "--stages", "partition", "--peers", "--skip_memory", "--batch_size", "2"]
    assert command.main([*QUICK, *arguments, "--output", str(tmp_path)]) == 0
    own, peers = (tmp_path / "results.md").read_text(encoding="utf-8").split("## What else there is")
    assert "| m128 | partition |" in own and "AutoencoderKL" not in own
    for name in ("AutoencoderKL (SDXL)", "AutoencoderDC (f32c32)", "AutoencoderTiny"):
        assert f"| {name} | encode + decode |" in peers
    assert "| size | stage | bfloat16 | float32 |" in peers
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["peer"] for row in rows] == [False, True, True, True]
    # bfloat16 has 8 bits: an error of a hundredth or so, and no zero, or the peer was not converted at all.
    assert all(1e-4 < row["difference"] < 0.2 for row in rows[1:])


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler, which torch.compile needs on a CPU")
def test_compiled(tmp_path):
    """Each stage is one graph; operations are counted as without compiling."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stages = ["--sizes", "mini", "--stages", "stem", "network", "--dtype", "float32", "--skip_memory"]
    documents = []
    for extra in ([], ["--compile", "default"]):
        assert command.main([*QUICK, *stages, *extra, "--output", str(tmp_path)]) == 0
        documents.append(json.loads((tmp_path / "results.json").read_text()))
    plain, compiled = documents
    assert (plain["compile"], compiled["compile"]) == (None, "default")
    assert "ours in float32, compiled (default)" in (tmp_path / "results.md").read_text(encoding="utf-8")
    for own, before in zip(compiled["rows"], plain["rows"], strict=True):
        assert own["ours"]["operations"] == before["ours"]["operations"] > 0
        assert own["difference"] < 1e-4  # float32 in another order
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_parts_of_the_run_on_a_gpu_are_commands(tmp_path):
    for part in benchmark_gpu.parts(tmp_path).values():
        first, *others = part.arguments
        if first != "-m":
            assert os.path.isfile(first)
        elif others[0] == "gpstoken_diffusers.benchmark":
            assert command.build_parser().parse_args(others[1:]).device == "cuda"
        else:
            assert others[0] == "pytest" and os.path.isdir(others[-1])


def test_a_part_that_fails_says_so_in_its_log(tmp_path, capfd):
    arguments = ["-c", "import os; print('part', os.environ['PART']); raise SystemExit(int(os.environ['PART']))"]
    for number in (0, 3):
        part = benchmark_gpu.Part(arguments, {"PART": str(number)})
        assert benchmark_gpu.run(f"part-{number}", part, tmp_path) == (number == 0)
        assert (tmp_path / f"part-{number}.log").read_text() == f"part {number}\n"
        assert f"part {number}\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds: expected a whole number of at least 1, got '0'"),
        (["--batch_size", "two"], "--batch_size: expected a whole number of at least 1, got 'two'"),
        (["--sizes", "huge"], "invalid choice: 'huge'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_options_that_argparse_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda:99"], "--device cuda:99: torch sees "),
        (["--device", "banana"], "--device banana: expected cpu, cuda or cuda:N."),
        (["--device", "meta"], "--device meta: expected cpu, cuda or cuda:N."),
        (["--sizes", "xl", "--stages", "splat"], "nothing to measure: xl has no stage splat."),
    ],
)
def test_mistakes_are_explained_before_anything_is_measured(arguments, message, capsys, tmp_path):
    assert command.main([*arguments, "--output", str(tmp_path / "results")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert command.main([*QUICK, "--output", str(tmp_path / "file")]) == 1
    assert "error" in capsys.readouterr().err


# ---- memory ----


def test_memory_is_that_of_a_fresh_process():
    arguments = [*QUICK, "--sizes", "mini", "--stages", "stem", "splat"]
    found = memory_in_fresh_process("twin", arguments)
    assert list(found) == ["mini: stem", "mini: splat"]
    if sys.platform == "linux":
        assert all(0 <= value < 1000 for value in found.values())


def test_peak_memory_sees_what_a_call_holds_for_a_moment():
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")

    def run():
        return (torch.ones(64, 2**20).sum(0)[:1],)  # 256 MB, and 1 MB when it is done

    assert 250 < peak_memory_mb(run, CPU) < 300


def test_a_failed_memory_process_costs_only_its_column(monkeypatch, tmp_path, capsys):
    def fail(way, arguments):
        raise RuntimeError("exit code -9: ")

    monkeypatch.setattr(command, "memory_in_fresh_process", fail)
    assert command.main([*QUICK, "--sizes", "l256", "--stages", "splat", "--output", str(tmp_path)]) == 0
    assert "the memory of ours could not be measured: exit code -9" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["ours"]["peak_memory_mb"] is None


# ---- the two ways ----


@pytest.mark.parametrize("size", SIZES)
def test_twins_compute_the_same(size):
    """In float32 the ways differ by the order of sums: 6e-8 each, over some twenty layers that each may double it."""
    for stage in toys(size).values():
        results = {way: stage.runs[way]() for way in WAYS}
        assert difference(results["ours"], results["twin"]) < 2e-5, stage.name
        assert not math.isnan(sum(result.double().sum().item() for result in results["twin"])), stage.name


def test_twins_run_by_the_plain_definitions(monkeypatch):
    stage, seen = toys("l256")["partition"], []
    monkeypatch.setattr(twins, "plain_partition", lambda *_: seen.append(reference_forced()))
    stage.runs["twin"]()
    assert seen == [True]
    assert not reference_forced()


@pytest.mark.parametrize("before", [None, "auto", "reference"])
def test_the_environment_is_given_back(monkeypatch, before):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(BACKEND_VARIABLE, before)
    with pytest.raises(KeyError), twins.plain_definitions():
        raise KeyError
    assert os.environ.get(BACKEND_VARIABLE) == before


def test_sampling_saves_the_half_that_guidance_does_not_need():
    """Of eight steps those at t = 0 and 1/8 are below the interval: 14 evaluations of a sample instead of 16."""
    stage = toys("xl", steps=8)["sampling"]
    ours, twin = (count_operations(stage.runs[way])[0] for way in ("ours", "twin"))
    assert ours / twin == pytest.approx(14 / 16)


def test_a_wrong_answer_is_seen():
    right = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert difference([right], [right]) == 0
    assert difference([right, right + right.std(correction=0)], [right, right]) == pytest.approx(1, rel=1e-6)
    assert math.isnan(difference([right * math.nan, right], [right, right]))
    assert difference([torch.full((3,), 2)], [torch.ones(3)]) == 1  # nothing to divide by
    with pytest.raises(ValueError, match="different shapes"):
        difference([right[:50]], [right])


# ---- counts and clocks ----


def test_operations_of_a_convolution_and_a_product():
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    operations, result = count_operations(lambda: convolution(torch.zeros(2, 3, 10, 12)))
    assert operations == 2 * (2 * 10 * 12) * 8 * (3 * 9)
    assert result.shape == (2, 8, 10, 12)
    assert count_operations(lambda: torch.zeros(5, 7) @ torch.zeros(7, 11))[0] == 2 * 5 * 7 * 11


def test_operations_of_a_splat():
    """On an 11 x 11 map pixels are 0.2 apart: boxes of half a width 0.3 and 0.5 at the centre hold 3 x 5 of them."""
    geometry = torch.tensor([[[0.1, 0.5 / 3, 0.0, 0.0, 0.0], [0.1, 0.1, 0.0, -1.0, -1.0]]])
    assert pairs_in_boxes(geometry, 11, 11, support=3.0) == 3 * 5 + 2 * 2  # the other is cut off by a corner
    texture = torch.ones(1, 2, 4)
    operations, _ = count_operations(lambda: splat_gaussians(geometry, texture, 11, 11))
    assert operations == 19 * (WEIGHT_OPERATIONS + 2 * 4)


def test_bytes():
    layer = nn.Linear(3, 4)
    assert weight_bytes([layer, layer], torch.bfloat16) == 2 * (12 + 4)
    assert tensor_bytes([torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64)]) == 48 + 40
    stage = toys("xl", torch.bfloat16, batch_size=1, steps=3)
    # Sampling reads the weights in every step; bfloat16 has half the bytes.
    once = stage["network"].weights_bytes
    assert stage["sampling"].weights_bytes == {way: 3 * once[way] for way in WAYS}
    assert once["twin"] == 2 * once["ours"]


def test_the_floor_is_the_longer_time():
    peak = Peak({torch.float32: 1e12}, bytes_per_s=1e10)
    assert peak.floor_s(Work(2 * 10**12, 10**10), torch.float32) == 2
    assert peak.floor_s(Work(10**12, 3 * 10**10), torch.float32) == 3


def test_a_peak_is_the_better_of_two_measurements():
    first = Peak({torch.float32: 1.0, torch.float16: 4.0}, 2.0)
    second = Peak({torch.float32: 3.0, torch.float16: 3.0}, 1.0)
    assert first.best(second) == Peak({torch.float32: 3.0, torch.float16: 4.0}, 2.0)


def test_ways_take_turns():
    order, rounds = [], []
    runs = {"twin": lambda: order.append("twin"), "ours": lambda: order.append("ours")}
    timings = alternate(runs, 3, {"twin": 1.0, "ours": 0.04}, lambda: None, lambda: rounds.append(1))
    ours = ["ours"] * 2  # two calls of 0.04 s fit into the shortest round
    assert order == ["twin", *ours, *ours, "twin", "twin", *ours]
    assert len(rounds) == 6 and all(len(timing.seconds) == 3 for timing in timings.values())


def test_medians_and_quartiles():
    assert Timing((3.0, 1.0, 2.0, 5.0, 4.0)).median == 3
    assert Timing((3.0, 1.0, 2.0, 5.0, 4.0)).quartiles == (2, 4)
    assert Timing((7.0,)).quartiles == (7, 7)
