"""Times the native norms on the CPU, with the SiLU that follows them, forward and backward.

    python tests/benchmarks/benchmark_norm.py

Maps are those of gpstoken-mini (192 channels at 64 x 64) and of the released decoder (512 at 64 x 64, 128 at 256 x
256), channels innermost. `torch` is torch's own norm, whose group norm is inaccurate there, see ops/group_norm.py.
`copy` reads and writes the map once: nothing can be faster.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import REFERENCE, Case, conditions, copy, main, make_parser, run_cases
from torch import Tensor

from gpstoken_diffusers.ops.group_norm import group_norm
from gpstoken_diffusers.ops.norm_reference import group_norm_reference, pixel_norm_reference
from gpstoken_diffusers.ops.pixel_norm import pixel_norm

SHAPES = [(4, 192, 64, 64), (1, 512, 64, 64), (1, 128, 256, 256)]
DTYPES = [torch.float32, torch.bfloat16]
GROUPS, EPS = 32, 1e-6


def torch_pixel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)
    return F.silu(rows.permute(0, 3, 1, 2))


def torch_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight.to(x.dtype), bias.to(x.dtype), EPS))


KINDS: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "pixel": {
        "native": lambda x, w, b: pixel_norm(x, w, b, EPS, silu=True),
        "torch": torch_pixel_norm,
        REFERENCE: lambda x, w, b: pixel_norm_reference(x, w, b, EPS, True),
    },
    "group": {
        "native": lambda x, w, b: group_norm(x, w, b, GROUPS, EPS, silu=True),
        "torch": torch_group_norm,
        REFERENCE: lambda x, w, b: group_norm_reference(x, w, b, GROUPS, EPS, False, True),
    },
}


def cases() -> Iterator[Case]:
    for kind, shape, dtype in itertools.product(KINDS, SHAPES, DTYPES):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1])
        forward: dict[str, Callable] = {"copy": partial(copy, x.detach(), torch.empty_like(x, requires_grad=False))}
        backward: dict[str, Callable] = {}
        for name, function in KINDS[kind].items():
            forward[name] = torch.no_grad()(lambda f=function, x=x, w=weight, b=bias: (f(x, w, b),))
            out = function(x, weight, bias)
            backward[name] = partial(torch.autograd.grad, out, [x, weight], torch.ones_like(out), retain_graph=True)
        for name, ways in (("forward", forward), ("backward", backward)):
            labels = {"norm": kind, "map": "x".join(map(str, shape)), "dtype": str(dtype)[6:]}
            yield Case(f"Norms, {name}", labels, ways)


def run() -> None:
    args = make_parser(__doc__, rounds=7, threads=1).parse_args()
    count = 2 * len(KINDS) * len(SHAPES) * len(DTYPES)
    run_cases(args, "Norms", conditions(args), cases(), count)


if __name__ == "__main__":
    sys.exit(main(run))
