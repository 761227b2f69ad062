"""Times linear layers in inference on the CPU, with the GELU that follows some of them.

    python tests/benchmarks/benchmark_linear.py

Layers are those of gpstoken-mini's transformer (width 320) and of L256's (512), at 2 pictures of 128 tokens or one of
256, and the modulation of two samples. `packed` gets a weight that was put in oneDNN's own order before. On a machine
with other work, the least of many rounds says more than their median: see results.json of `--output`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from harness import REFERENCE, Case, conditions, main, make_parser, run_cases
from torch import nn

from gpstoken_diffusers.ops.linear import run_linear

SIZES = [(256, 320, 320), (256, 320, 1280), (256, 1280, 320), (256, 512, 2048), (2, 320, 1920)]  # rows, in, out
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = {"": None, "GELU": nn.GELU(), "tanh GELU": nn.GELU("tanh")}


def cases() -> Iterator[Case]:
    for dtype, (rows, inputs, outputs), name in itertools.product(DTYPES, SIZES, ACTIVATIONS):
        layer, activation = nn.Linear(inputs, outputs, dtype=dtype), ACTIVATIONS[name]
        modules = nn.Sequential(layer, activation or nn.Identity())
        x = torch.randn(rows, inputs, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        attr, algorithm = ("gelu", activation.approximate) if activation else ("none", "")
        ways: dict[str, Callable] = {
            "run_linear": lambda a=layer, b=x, c=activation: (run_linear(a, b, c),),
            "packed": lambda a=x, b=packed, c=layer.bias, d=attr, e=algorithm: (
                torch.ops.mkldnn._linear_pointwise(a, b, c, d, [], e),
            ),
            REFERENCE: lambda a=modules, b=x: (a(b),),
        }
        labels = {"rows": str(rows), "layer": f"{inputs} -> {outputs}", "then": name, "dtype": str(dtype)[6:]}
        yield Case("Linear layers", labels, {way: torch.inference_mode()(call) for way, call in ways.items()})


def run() -> None:
    args = make_parser(__doc__, rounds=15, threads=1).parse_args()
    count = len(DTYPES) * len(SIZES) * len(ACTIVATIONS)
    run_cases(args, "Linear layers", conditions(args), cases(), count)


if __name__ == "__main__":
    sys.exit(main(run))
