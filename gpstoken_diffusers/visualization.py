"""Pictures of tokens: a glow map, an ellipse overlay, and the side-by-side panel."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor

from .geometry import CENTER, RHO, SIGMA
from .ops.splat import splat_gaussians
from .safe_files import write_atomically
from .tokens import GPSTokens

STYLES = ("glow", "ellipses")

ELLIPSE_LEVEL = 1.5
"""Radius of the ellipses in sigmas: that of an initial Gaussian then touches the sides of its region."""

# Colours by size, from small Gaussians to large: hot where the picture is busy, cool where it is calm.
_SIZE_COLORS = ("#fff3b0", "#ffb13b", "#ff4d4d", "#c026d3", "#5b5bf0", "#22a7f0", "#12d6c5")
_SIZE_COLORS_ON_PHOTO = ("#fffbd6", "#ffdd4a", "#ff9a5c", "#ff7ad9", "#b9a8ff", "#66d0ff", "#5cffe4")
_SIZE_COLORS_ON_WHITE = ("#e08a00", "#d9540b", "#c81e3a", "#a21caf", "#4338ca", "#0369a1", "#0f766e")
_PHOTO_BRIGHTNESS = 0.65  # under ellipses, so that thin lines can be seen
_SIZE_OCTAVES = (-1.6, 2.6)  # log2 of a Gaussian's width over the mean width of N equal ones

# Each Gaussian glows as three Gaussians around one centre: (share of sigma, strength, share of white).
_GLOW_LAYERS = ((0.9, 0.16, 0.0), (0.42, 0.8, 0.12), (0.16, 0.9, 0.7))
_GLOW_SUPPORT = 5.0  # in sigmas; at 3 the cut would show as a faint box
_GLOW_EXPOSURE = 1.6
_GLOW_BACKGROUND = "#05060c"
_GAMMA = 2.2


def visualize_gaussians(
    tokens: GPSTokens | Tensor,
    image: Image.Image | Sequence[Image.Image] | Tensor | None = None,
    style: str = "glow",
    size: tuple[int, int] | None = None,
) -> list[Image.Image]:
    """Draw the Gaussians of every image in a batch.

    Args:
        tokens: what to draw; only the geometry matters. A geometry (B, N, 5) float32 alone needs `size`.
        image: the pictures, as PIL images or as a tensor (B, 3, H, W) in [-1, 1]; a single PIL image will do
            for a batch of one. "glow" takes its colours from them, "ellipses" draws over them, dimmed. Colour
            otherwise tells the size of a Gaussian, from small and hot to large and cool; the ground is dark
            for "glow" and white for "ellipses".
        style: "glow", soft lights that add up on a dark ground, or "ellipses", outlines at 1.5 sigma.
        size: (height, width) in pixels of the result; None takes `tokens.image_size`.

    Returns:
        One RGB picture per image of the batch.

    Raises:
        ValueError: the style is unknown, the pictures are not as many as the batch, a token is impossible, or a
            geometry comes without a size.
        TypeError: `image` is of another kind.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, not {style!r}")
    if isinstance(tokens, Tensor):
        if size is None:
            raise ValueError("a geometry says nothing of its picture: give size=(height, width) with it")
        tokens = GPSTokens.from_geometry(tokens, size)
    tokens = tokens.detach().cpu().validate()
    height, width = size or tokens.image_size
    grounds = _as_pictures(image, tokens.batch_size, (width, height))
    geometry_px = _geometry_px(tokens, height, width)
    draw = _draw_glow if style == "glow" else _draw_ellipses
    return [draw(gaussians, ground, height, width) for gaussians, ground in zip(geometry_px, grounds, strict=True)]


_WIDEST_COLUMN = 1024  # px


def panel(columns: Sequence[tuple[str, Image.Image]], footer: str = "") -> Image.Image:
    """Set pictures side by side, each under its title, over one line of text.

    Pictures are scaled to one height: that of the tallest, at least 256 px so that the text can be read. But none gets
    wider than 1024 px by it.

    Args:
        columns: (title, picture) from left to right.
        footer: a line under all, such as PSNR and SSIM.

    Raises:
        ValueError: there are no columns.
    """
    if not columns:
        raise ValueError("a panel needs at least one column (title, picture)")
    height = max(256, *(picture.height for _, picture in columns))
    # Wide pictures are not enlarged, or the panel would be wider still.
    widest = max(picture.width * height / picture.height for _, picture in columns)
    height = max(1, round(height * min(1.0, max(_WIDEST_COLUMN, *(picture.width for _, picture in columns)) / widest)))
    pictures = []
    for _, picture in columns:
        width = max(1, round(picture.width * height / picture.height))
        enlarge = picture.height * 2 <= height  # small pictures keep their pixels visible
        resample = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
        pictures.append(picture.convert("RGB").resize((width, height), resample))
    text = max(14, round(height / 18))
    margin = round(text * 0.9)
    band = round(text * 2.0)
    total_width = sum(picture.width for picture in pictures) + margin * (len(pictures) + 1)
    total_height = band + height + (band if footer else margin)
    sheet = Image.new("RGB", (total_width, total_height), "#0d1016")
    draw = ImageDraw.Draw(sheet)
    left = margin
    for (title, _), picture in zip(columns, pictures, strict=True):
        sheet.paste(picture, (left, band))
        font = _fitting_font(title, text, picture.width)
        draw.text((left + picture.width / 2, band / 2), title, fill="#f2f4f8", font=font, anchor="mm")
        left += picture.width + margin
    if footer:
        font = _fitting_font(footer, text, total_width - 2 * margin)
        draw.text((total_width / 2, band + height + band / 2), footer, fill="#aeb6c4", font=font, anchor="mm")
    return sheet


def _square_columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def grid_size(count: int, side: int, gap: int = 4) -> tuple[int, int]:
    """(width, height) in pixels of a [`picture_grid`] of so many squares of `side` px."""
    columns = _square_columns(count)
    return columns * (side + gap) + gap, math.ceil(count / columns) * (side + gap) + gap


def picture_grid(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 4) -> Image.Image:
    """Set pictures of one size in rows on white.

    Args:
        pictures: at least one, all of one size.
        columns: pictures in a row; None makes the grid as square as it can be.
        gap: px of white between pictures and around them.

    Raises:
        ValueError: no pictures, pictures of several sizes, or fewer than one column.
    """
    if not pictures or len({picture.size for picture in pictures}) > 1:
        raise ValueError("a grid needs pictures, all of one size")
    columns = _square_columns(len(pictures)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"a grid needs at least one column, not {columns}")
    columns = min(columns, len(pictures))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(picture.convert("RGB"), (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def write_png(picture: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG whole or not at all: who looks while a run draws sees the old picture. Raises OSError."""
    picture.save(data := io.BytesIO(), "PNG")
    write_atomically(path, data.getvalue())


def _geometry_px(tokens: GPSTokens, height: int, width: int) -> Tensor:
    """(B, N, 5) in pixels of a picture of that size: sigma_x, sigma_y, rho, x, y; pixel i is centred at i."""
    canvas = torch.tensor([max(side - 1, 1) for side in reversed(tokens.canvas_size)])
    scale = torch.tensor([width / tokens.image_size[1], height / tokens.image_size[0]])
    geometry = tokens.geometry
    sigma = geometry[..., SIGMA] * canvas / 2 * scale
    center = ((geometry[..., CENTER] + 1) * canvas / 2 + 0.5) * scale - 0.5
    return torch.cat([sigma, geometry[..., RHO, None], center], dim=-1)


def _draw_glow(gaussians: Tensor, ground: Image.Image | None, height: int, width: int) -> Image.Image:
    relative_size = _relative_size(gaussians, height, width)
    if ground is None:
        color = _palette(_SIZE_COLORS, relative_size)
    else:
        color = _colors_at_centers(gaussians, ground)
    # Large Gaussians a little dimmer, or their cores would drown the small ones.
    color = color * relative_size.pow(-0.25).clamp(0.3, 1.6)[:, None]
    layers = [_ndc(_widened(gaussians, share), height, width) for share, _, _ in _GLOW_LAYERS]
    lights = [(color + (1 - color) * white) * strength for _, strength, white in _GLOW_LAYERS]
    light = splat_gaussians(torch.cat(layers)[None], torch.cat(lights)[None], height, width, _GLOW_SUPPORT)[0]
    background = _linear(_GLOW_BACKGROUND)[:, None, None]
    shown = background + (1 - background) * (1 - torch.exp(-_GLOW_EXPOSURE * light))
    return _picture(shown.clamp(0, 1) ** (1 / _GAMMA))


def _draw_ellipses(gaussians: Tensor, ground: Image.Image | None, height: int, width: int) -> Image.Image:
    # Drawn enlarged and reduced again, as ImageDraw does not anti-alias; other pixels come back as they were.
    zoom = max(1, min(4, 8192 // max(height, width)))
    if ground is None:
        sheet, colors = Image.new("RGB", (width * zoom, height * zoom), "white"), _SIZE_COLORS_ON_WHITE
    else:
        sheet = ImageEnhance.Brightness(ground).enhance(_PHOTO_BRIGHTNESS)
        sheet = sheet.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        colors = _SIZE_COLORS_ON_PHOTO
    draw = ImageDraw.Draw(sheet, "RGBA")
    mean_width = math.sqrt(height * width / len(gaussians))
    line = max(1.0, min(min(height, width) / 220, mean_width / 10)) * zoom
    relative_size = _relative_size(gaussians, height, width)
    inks = (_palette(colors, relative_size) ** (1 / _GAMMA) * 255).round().int().tolist()
    # ImageDraw counts from the corner of the first pixel, and is fastest with lists of x, y, x, y, ...
    outlines = ((_outlines(gaussians) + 0.5) * zoom).flatten(1).tolist()
    order = relative_size.argsort(descending=True).tolist()  # small ones on top
    if ground is not None:
        for token in order:
            draw.line(outlines[token], fill=(0, 0, 0, 100), width=round(2.4 * line))
    for token in order:
        draw.line(outlines[token], fill=tuple(inks[token]), width=round(line))
    return sheet.reduce(zoom)


def _outlines(gaussians: Tensor, corners: int = 80) -> Tensor:
    """Points of the ellipses d^T covariance^-1 d = level^2: (N, corners + 1, 2) in pixels.

    A circle times the Cholesky factor of [[sx^2, rho sx sy], [rho sx sy, sy^2]].
    """
    angle = torch.linspace(0, 2 * math.pi, corners + 1)
    rho, (sigma_x, sigma_y) = gaussians[:, RHO, None], gaussians[:, SIGMA].mT[..., None]
    x = sigma_x * angle.cos()
    y = sigma_y * (rho * angle.cos() + (1 - rho * rho).sqrt() * angle.sin())
    return gaussians[:, None, CENTER] + ELLIPSE_LEVEL * torch.stack([x, y], dim=-1)


def _relative_size(gaussians: Tensor, height: int, width: int) -> Tensor:
    """(N,) width of each Gaussian over the width that N equal initial Gaussians would have."""
    mean_sigma = math.sqrt(height * width / len(gaussians)) / (2 * ELLIPSE_LEVEL)
    return gaussians[:, SIGMA].prod(dim=-1).sqrt() / mean_sigma


def _palette(colors: Sequence[str], relative_size: Tensor) -> Tensor:
    """(N, 3) linear light, interpolated along the colours by the logarithm of the size."""
    smallest, largest = _SIZE_OCTAVES
    stops = torch.stack([_linear(color) for color in colors])
    position = ((relative_size.log2() - smallest) / (largest - smallest)).clamp(0, 1) * (len(stops) - 1)
    lower = position.floor().long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[lower], stops[lower + 1], (position - lower)[:, None])


def _colors_at_centers(gaussians: Tensor, ground: Image.Image) -> Tensor:
    """(N, 3) linear light: the picture's colour around each centre, made vivid, and never quite black."""
    pixels = _tensor(ground)
    reach = max(1, min(pixels.shape[-2:]) // 128)
    pixels = F.avg_pool2d(pixels, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
    x, y = gaussians[:, CENTER].round().long().unbind(-1)
    color = pixels[:, y.clamp(0, pixels.shape[1] - 1), x.clamp(0, pixels.shape[2] - 1)].mT
    grey = color.mean(dim=-1, keepdim=True)
    color = (grey + 1.4 * (color - grey)).clamp(0.05, 1) ** _GAMMA
    brightest = color.amax(dim=-1, keepdim=True)
    return color / brightest * brightest.pow(0.6).clamp(min=0.25)


def _widened(gaussians: Tensor, share: float) -> Tensor:
    """Sigmas times `share`, then blurred by half a pixel: a thin Gaussian must not slip between pixels."""
    sigma = gaussians[:, SIGMA] * share
    wide = (sigma.square() + 0.25).sqrt()
    rho = gaussians[:, RHO] * sigma.prod(dim=-1) / wide.prod(dim=-1)
    return torch.cat([wide, rho[:, None], gaussians[:, CENTER]], dim=-1)


def _ndc(gaussians: Tensor, height: int, width: int) -> Tensor:
    """Pixels -> [-1, 1] coordinates of a picture of that size."""
    half = torch.tensor([max(width - 1, 1) / 2, max(height - 1, 1) / 2])
    sigma, center = gaussians[:, SIGMA] / half, gaussians[:, CENTER] / half - 1
    return torch.cat([sigma, gaussians[:, RHO, None], center], dim=-1)


def _as_pictures(
    image: Image.Image | Sequence[Image.Image] | Tensor | None, count: int, size: tuple[int, int]
) -> list[Image.Image | None]:
    if image is None:
        return [None] * count
    if isinstance(image, Tensor):
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image must have the shape (B, 3, H, W), not {tuple(image.shape)}")
        pictures = [_picture((pixels.detach().cpu().float() + 1) / 2) for pixels in image]
    else:
        pictures = [image] if isinstance(image, Image.Image) else list(image)
    if not all(isinstance(picture, Image.Image) for picture in pictures):
        raise TypeError("image must be a PIL image, a list of them, or a tensor (B, 3, H, W) in [-1, 1]")
    if len(pictures) != count:
        raise ValueError(f"there are {count} images of tokens, but {len(pictures)} pictures to go with them")
    return [picture.convert("RGB").resize(size, Image.Resampling.LANCZOS) for picture in pictures]


def _fitting_font(text: str, size: int, width: float) -> ImageFont.FreeTypeFont:
    while size > 8 and ImageFont.load_default(size).getlength(text) > width:
        size -= 1
    return ImageFont.load_default(size)


def _linear(color: str) -> Tensor:
    """A colour like "#ff8800" as (3,) linear light in [0, 1]."""
    return torch.tensor([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]) ** _GAMMA


def _tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.reshape(picture.height, picture.width, 3).permute(2, 0, 1) / 255


def _picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> RGB."""
    data = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.fromarray(data.numpy())
