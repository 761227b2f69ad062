"""Times the native partition against its reference, and on a GPU against bringing the pictures to the CPU and back.

    python tests/benchmarks/benchmark_partition.py [--device cuda]

The photograph that the package ships. The official Python code took 92 ms for 256 tokens of a 256-px image, and 24 ms
for 64, on one core of a 2.3-GHz Xeon.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from harness import CPU, REFERENCE, Case, conditions, main, make_parser, photograph, run_cases

from gpstoken_diffusers.ops.partition import grayscale, partition_image
from gpstoken_diffusers.ops.partition_reference import partition_image_reference

ON_CPU = [((256, 256), 64, 1), ((256, 256), 256, 1), ((256, 256), 1024, 1), ((300, 500), 256, 1), ((256, 256), 256, 16)]
ON_GPU = [((256, 256), count, batch) for batch, count in ((1, 64), (1, 256), (8, 256), (64, 128), (64, 256))]


def cases(device: torch.device) -> Iterator[Case]:
    for size, count, batch in ON_GPU if device.type == "cuda" else ON_CPU:
        images = photograph(*size).expand(batch, -1, -1, -1).to(device)
        labels = {"images": f"{batch} x {size[0]} x {size[1]}", "tokens": str(count)}
        ways = {"native": lambda images=images, count=count: (partition_image(images, count).regions,)}
        if device.type == "cuda":
            ways["by the CPU"] = lambda i=images, n=count: (partition_image(i.cpu(), n).regions.to(device),)
        else:
            grey = grayscale(images).numpy()
            ways[REFERENCE] = lambda grey=grey, n=count: (torch.from_numpy(partition_image_reference(grey, n)),)
        yield Case("Partition", labels, ways, device)


def run() -> None:
    parser = make_parser(__doc__, threads=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device) if args.device == "cuda" else CPU
    run_cases(args, "Partition", conditions(args, device), cases(device), len(ON_CPU), device=device)


if __name__ == "__main__":
    sys.exit(main(run))
