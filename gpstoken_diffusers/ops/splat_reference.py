"""The reference of `splat_gaussians` and of its gradient: PyTorch, for every device.

A token has geometry (sigma_x, sigma_y, rho, x, y) in [-1, 1] coordinates of the image. At the pixel centre
(px, py), with u = (px - x) / sigma_x and v = (py - y) / sigma_y, its weight is

    exp(-(u^2 - 2 rho u v + v^2) / (2 (1 - rho^2)))    where |px - x| <= support sigma_x and |py - y| <=
    support sigma_y,

else 0, and the map is the sum over tokens of weight times texture. The exponent is evaluated as -(q^2 + v^2)
/ 2 with q = k (u - rho v) and k = 1 / sqrt(1 - rho^2): the same number, without cancellation where |rho| is
near 1. Gradients are those of this formula with the box held fixed.

A token paints nothing, and has zero gradients, if its geometry is not finite, a sigma is not a positive
(normal) number, or |rho| >= 1. Everything is dense, weights (pixels, tokens) times texture (tokens,
channels), in bands of rows that bound the memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["pixel_centers", "splat_gaussians_backward_reference", "splat_gaussians_reference"]

_WEIGHTS_PER_BAND = 2**23  # elements of the largest intermediate: 32 MB in float32


def pixel_centers(n: int, device: torch.device | str | None = None) -> Tensor:
    """Coordinates (n,) of an axis of n samples, float32: 2 i / (n - 1) - 1 rounded once; 0 if n = 1."""
    if n == 1:
        return torch.zeros(1, device=device)
    # On the CPU, because not every device has float64.
    centers = torch.arange(n, dtype=torch.float64, device="cpu") * 2.0 / (n - 1) - 1.0
    return centers.float().to(device)


def splat_gaussians_reference(
    geometry: Tensor, texture: Tensor, height: int, width: int, support: float = 3.0
) -> Tensor:
    """geometry (B, N, 5), texture (B, N, C) -> map (B, C, height, width) in texture's dtype.

    Evaluated in float32, or in float64 if either input is; differentiable by autograd.
    """
    dtype = _compute_dtype(geometry, texture)
    colors = texture.to(dtype)
    bands = []
    with torch.autocast(geometry.device.type, enabled=False):
        for _, weight, _, _ in _bands(geometry.to(dtype), height, width, support):
            bands.append(torch.einsum("bhwn,bnc->bchw", weight, colors))
    return torch.cat(bands, dim=2).to(texture.dtype).contiguous()


def splat_gaussians_backward_reference(
    geometry: Tensor, texture: Tensor, grad_out: Tensor, support: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(map * grad_out) for grad_out (B, C, H, W): (B, N, 5) and (B, N, C)."""
    dtype = _compute_dtype(geometry, texture)
    shape, colors, grad = geometry.to(dtype), texture.to(dtype), grad_out.to(dtype)
    sigma_x, sigma_y, rho, _, _ = shape.unbind(-1)
    moments = shape.new_zeros(5, *shape.shape[:2])  # sums over pixels of s weight {q, v, q^2, q v, v^2}
    grad_texture = torch.zeros_like(colors)
    with torch.autocast(geometry.device.type, enabled=False):
        for rows, weight, q, v in _bands(shape, *grad_out.shape[2:], support):
            grad_texture += torch.einsum("bhwn,bchw->bnc", weight, grad[:, :, rows])
            scaled = weight * torch.einsum("bchw,bnc->bhwn", grad[:, :, rows], colors)
            scaled_q = scaled * q
            # v is constant along a row, so its factors come in after the sum over columns.
            by_row, by_row_q = scaled.sum(2), scaled_q.sum(2)
            moments[0] += by_row_q.sum(1)
            moments[1] += (by_row * v).sum(1)
            moments[2] += (scaled_q * q).sum((1, 2))
            moments[3] += (by_row_q * v).sum(1)
            moments[4] += (by_row * v * v).sum(1)
    m_q, m_v, m_qq, m_qv, m_vv = moments
    k = torch.rsqrt((1 - rho) * (1 + rho))
    grad_geometry = torch.stack(
        [
            (m_qq + k * rho * m_qv) / sigma_x,
            (m_vv - k * rho * m_qv) / sigma_y,
            k * m_qv - rho * k * k * m_qq,
            k * m_q / sigma_x,
            (m_v - k * rho * m_q) / sigma_y,
        ],
        dim=-1,
    )
    grad_geometry = torch.where(_paints(shape)[..., None], grad_geometry, 0)
    return grad_geometry.to(geometry.dtype).contiguous(), grad_texture.to(texture.dtype).contiguous()


def _compute_dtype(geometry: Tensor, texture: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (geometry.dtype, texture.dtype) else torch.float32


def _paints(geometry: Tensor) -> Tensor:
    """(B, N) bool: which tokens paint at all."""
    sigma, rho = geometry[..., :2], geometry[..., 2]
    positive = (sigma >= torch.finfo(torch.float32).tiny).all(-1)
    return geometry.isfinite().all(-1) & positive & (rho.abs() < 1)


def _bands(geometry: Tensor, height: int, width: int, support: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Bands of R rows: (rows, weight (B, R, W, N), q (B, R, W, N), v (B, R, N))."""
    paints = _paints(geometry)
    harmless = geometry.new_tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    # One token each as (B, 1, N), to broadcast over the pixels of an axis.
    sigma_x, sigma_y, rho, x, y = torch.where(paints[..., None], geometry, harmless).unsqueeze(1).unbind(-1)
    k = torch.rsqrt((1 - rho) * (1 + rho))[:, None]
    dx = pixel_centers(width, geometry.device).to(geometry.dtype)[:, None] - x
    in_x = (dx.abs() <= support * sigma_x) & paints[:, None]
    # Zero, not merely unused, outside the box: 0 times an overflow there would be NaN in the gradient.
    u = torch.where(in_x, dx, 0) / sigma_x
    py = pixel_centers(height, geometry.device).to(geometry.dtype)
    batch, _, tokens = x.shape
    rows_per_band = max(1, _WEIGHTS_PER_BAND // max(1, batch * width * tokens))
    for top in range(0, height, rows_per_band):
        rows = slice(top, min(top + rows_per_band, height))
        dy = py[rows, None] - y
        in_y = dy.abs() <= support * sigma_y
        v = torch.where(in_y, dy, 0) / sigma_y
        inside = in_y[:, :, None] & in_x[:, None]
        q = k * (u[:, None] - (rho * v)[:, :, None])
        weight = torch.exp(-0.5 * (q * q + (v * v)[:, :, None])) * inside
        yield rows, weight, q, v
