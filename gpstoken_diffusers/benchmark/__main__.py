"""Times ours against a plain twin, and both against what this device could do at best.

    python -m gpstoken_diffusers.benchmark                                    # every size and stage, on the CPU
    python -m gpstoken_diffusers.benchmark --device cuda --batch_size 8 --peers --compile reduce-overhead
    python -m gpstoken_diffusers.benchmark --sizes l256 --stages splat decoder --rounds 9 --dtype float32

Writes results.md, results.json and plot.png. Weights are made up: nothing is downloaded, times do not depend on them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..ops.backend import native
from .harness import Row, all_stages, measure_stage, memory_in_fresh_process, memory_key, memory_of
from .peers import PEERS
from .report import Conditions, plot_advice, write_plot, write_report
from .roofline import Peak, measure_peak
from .stages import SIZES, STAGES, WAYS, Settings, stage_names

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpstoken_diffusers.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="tokenizers and generators")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="parts, and whole ways")
    parser.add_argument("--peers", action="store_true", help="diffusers' AutoencoderKL, DC and Tiny too")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda" or "cuda:1" (default: cpu)')
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of ours; the twin is always float32")
    parser.add_argument("--batch_size", type=_positive, default=1, help="pictures at once (default: 1)")
    parser.add_argument("--compile", choices=MODES, help="ours by torch.compile; a CPU's memory is then not measured")
    parser.add_argument("--sampling_steps", type=_positive, help="of the stage sampling (default: mini 20, xl 4)")
    parser.add_argument("--rounds", type=_positive, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--skip_memory", action="store_true", help="do not measure memory: on a CPU it takes as long")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="toy networks: whether it runs, in seconds")
    parser.add_argument("--memory_of", choices=WAYS, help=argparse.SUPPRESS)  # what the fresh processes are asked for
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 0, or 1 for a mistake in what was asked for (argparse exits with 2)."""
    args = build_parser().parse_args(argv)
    try:
        settings = _settings(args)
        torch.set_num_threads(args.threads)
        if args.memory_of:
            print(json.dumps(memory_of(args.memory_of, all_stages(args.sizes, args.stages, args.peers, settings))))
        else:
            _run(args, settings)
    except (ValueError, OSError) as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return 1
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: expected cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ValueError(f"--device {args.device}: torch sees {there} CUDA devices. Use another, or --device cpu.")
    if not args.peers and not any(stage_names(size, args.stages) for size in args.sizes):
        raise ValueError(
            f"nothing to measure: {', '.join(args.sizes)} has no stage {', '.join(args.stages)}. The sizes mini and xl "
            "have network and sampling; all sizes but xl have the other stages."
        )
    return Settings(device, DTYPES[args.dtype], args.batch_size, args.sampling_steps, args.quick, args.compile)


def _run(args: argparse.Namespace, settings: Settings) -> None:
    advice = plot_advice()
    if advice:
        print(f"benchmark: {advice}", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    count = sum(len(stage_names(size, args.stages)) for size in args.sizes) + len(PEERS) * args.peers
    in_processes = settings.device.type == "cpu" and not (args.skip_memory or args.compile)
    rows: list[Row] = []
    peak = measure_peak(settings.device, [torch.float32, settings.dtype], small=args.quick)
    conditions = _conditions(args, settings, peak)
    with tqdm(total=count * len(WAYS) * (1 + args.rounds) + len(WAYS) * in_processes, unit="call") as progress:
        for stage, peer in all_stages(args.sizes, args.stages, args.peers, settings):
            progress.set_description(f"{stage.size}, {stage.name}")
            rows.append(measure_stage(stage, peer, args.rounds, progress.update))
            write_report(args.output, rows, conditions)  # what is done stays, should the next one fail
            stage = None  # its models go before those of the next size come
        again = measure_peak(settings.device, [torch.float32, settings.dtype], small=args.quick)
        conditions = _conditions(args, settings, peak.best(again))
        for way in WAYS if in_processes else ():
            progress.set_description(f"memory, {way}")
            _add_memory(rows, way, args)
            progress.update()
    write_report(args.output, rows, conditions)
    if not advice:
        write_plot(args.output / "plot.png", rows, conditions)
    print((args.output / "results.md").read_text(encoding="utf-8"))


def _add_memory(rows: Sequence[Row], way: str, args: argparse.Namespace) -> None:
    arguments = ["--sizes", *args.sizes, "--stages", *args.stages, "--device", args.device, "--dtype", args.dtype]
    arguments += ["--batch_size", str(args.batch_size), "--threads", str(args.threads)]
    arguments += ["--sampling_steps", str(args.sampling_steps)] if args.sampling_steps else []
    arguments += ["--peers"] * args.peers + ["--quick"] * args.quick
    try:
        found = memory_in_fresh_process(way, arguments)
    except RuntimeError as error:
        tqdm.write(f"benchmark: the memory of {way} could not be measured: {error}", file=sys.stderr)
        return
    for row in rows:
        row.memory_mb[way] = found[memory_key(row.size, row.stage)]


def _conditions(args: argparse.Namespace, settings: Settings, peak: Peak) -> Conditions:
    device = settings.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    products = {str(dtype).removeprefix("torch."): speed for dtype, speed in peak.operations_per_s.items()}
    compiled = f"compiled ({args.compile})" if args.compile else "not compiled"
    libraries = {kind: _library(kind) for kind in dict.fromkeys(("cpu", device.type))}
    lines = (
        f"{name}, {args.threads} CPU threads, torch {torch.__version__}, gpstoken_diffusers {__version__}",
        f"batches of {args.batch_size}; ours in {args.dtype}, {compiled}, the twin in float32",
        "native libraries: " + "; ".join(f"{kind}: {state}" for kind, state in libraries.items()),
        f"the device's best, measured: matrix products at {_speeds(products)} TFLOP/s, a copy at "
        f"{peak.bytes_per_s / 1e9:.3g} GB/s read and written",
    )
    toys = " (toy networks: the times mean nothing)" if args.quick else ""
    values = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "threads": args.threads,
        "torch": torch.__version__,
        "version": __version__,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "compile": args.compile,
        "rounds": args.rounds,
        "toy": args.quick,
        "native_libraries": libraries,
        "matrix_product_flop_per_s": products,
        "copy_bytes_per_s": peak.bytes_per_s,
    }
    title = f"Speed of gpstoken_diffusers on {name}, {args.dtype}{toys}"
    return Conditions(title, lines, values, args.rounds, args.dtype, peak)


def _speeds(products: dict[str, float]) -> str:
    return ", ".join(f"{speed / 1e12:.3g} ({dtype})" for dtype, speed in products.items())


def _library(kind: str) -> str:
    """Whether ours runs natively, in a few words."""
    library = native.library(kind)
    if library is None:
        return native.why_missing(kind)
    return library.gpstoken_cpu_isa().decode() if kind == "cpu" else "in use"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
