"""Native ops have first derivatives; asked for second ones they say no, where zeros would pass unnoticed."""

from __future__ import annotations

import pytest
import torch

from gpstoken_diffusers.ops.group_norm import group_norm
from gpstoken_diffusers.ops.pixel_norm import pixel_norm
from gpstoken_diffusers.ops.splat import splat_gaussians


def splatted(x: torch.Tensor) -> torch.Tensor:
    geometry = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0]]])
    return splat_gaussians(geometry, x.flatten(1)[:, None, :4], 4, 4)


WEIGHT, BIAS = torch.ones(4), torch.zeros(4)
OPS = {
    "pixel_norm": lambda x: pixel_norm(x, WEIGHT, BIAS, 1e-6, silu=True),
    "group_norm": lambda x: group_norm(x, WEIGHT, BIAS, 2, 1e-6, silu=True),
    "splat_gaussians": splatted,
}


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_refused(name):
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (grad,) = torch.autograd.grad(OPS[name](x).square().sum(), x, create_graph=True)
    assert grad.abs().max() > 0
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        grad.square().sum().backward()
