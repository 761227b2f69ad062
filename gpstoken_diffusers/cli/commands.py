"""The commands for one picture: demo, encode, decode and panel."""

from __future__ import annotations

import argparse
import logging

from PIL import Image
from tqdm import tqdm

from ..assets import DEMO_PHOTOGRAPH
from ..tokens import GPSTokens
from ..visualization import panel as side_by_side
from ..visualization import visualize_gaussians
from .codec import Codec, Encoded, load_codec, quality, quality_text
from .encode_folder import encode_folder
from .files import (
    check_picture_size,
    check_picture_suffix,
    check_tokens_output,
    prepare_file,
    prepare_folder,
    write_picture,
)

logger = logging.getLogger(__name__)

PANEL_SIDE = 1024  # px, longest side of each picture in a panel
_SHARE_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def demo(args: argparse.Namespace) -> int:
    """The shipped photograph through the model: pictures of all steps, and the tokens."""
    prepare_folder(args.output)
    codec = load_codec(args)
    encoded = codec.encode(DEMO_PHOTOGRAPH, args.num_tokens)
    picture = codec.decode(encoded.tokens)
    values = quality(encoded.picture, picture)
    pictures = {
        "input.png": encoded.picture,
        "gaussians.png": visualize_gaussians(encoded.tokens, encoded.picture, "glow")[0],
        "ellipses.png": visualize_gaussians(encoded.tokens, encoded.picture, "ellipses")[0],
        "reconstruction.png": picture,
        "panel.png": _panel(encoded, picture, _summary(codec, encoded, values), "glow"),
    }
    for name, image in pictures.items():
        write_picture(image, args.output / name)
    encoded.tokens.save(args.output / "tokens.safetensors", codec.metadata())
    if not args.quiet:
        height, width = encoded.tokens.image_size
        print(f"picture    {width} x {height} px, {width * height * 3:,} bytes of pixels")
        print(f"model      {codec.name}")
        print(f"tokens     {_sizes(encoded.tokens)}")
        print(f"quality    {quality_text(values)}")
        print(f"written    {args.output}/: {', '.join([*pictures, 'tokens.safetensors'])}")
    return 0


def encode(args: argparse.Namespace) -> int:
    """A picture to a tokens file, or the pictures of a folder to one each."""
    if args.polish < 0:
        raise ValueError(f"--polish {args.polish}: the number of steps is at least 0.")
    if args.image.is_dir():
        return encode_folder(args)
    if args.output.suffix.lower() != ".safetensors":
        raise ValueError(f"the output {args.output} must end in .safetensors: tokens are stored in that format.")
    prepare_file(args.output, args.image)
    check_tokens_output(args.output)
    codec = load_codec(args)
    codec.check_num_tokens(args.num_tokens)
    with tqdm(total=1, desc="polish", bar_format=_SHARE_BAR, disable=args.quiet or not args.polish) as bar:
        encoded = codec.encode(
            args.image,
            args.num_tokens,
            args.importance,
            args.importance_strength,
            args.polish,
            lambda share: bar.update(share - bar.n),
        )
    encoded.tokens.save(args.output, codec.metadata(), dtype=args.encoding)
    if not args.quiet:
        stored = f"; stored as {args.encoding} in {args.output.stat().st_size:,} bytes" if args.encoding else ""
        print(f"{args.output}: {_sizes(encoded.tokens)}{stored}")
    return 0


def decode(args: argparse.Namespace) -> int:
    """A tokens file to a picture."""
    for name in ("width", "height"):
        side = getattr(args, name)
        if side is not None and side < 1:
            raise ValueError(f"--{name} {side}: a picture has at least 1 pixel along each axis.")
    check_picture_suffix(args.output)
    prepare_file(args.output, args.tokens)
    tokens = GPSTokens.load(args.tokens)
    metadata = GPSTokens.read_metadata(args.tokens)
    maker = metadata.get("model")
    if len(tokens) > 1:
        raise ValueError(f"{args.tokens} holds {len(tokens)} pictures; this command decodes files of one.")
    size = _size(tokens.image_size, args.height, args.width)
    height, width = tokens.image_size if size is None else size
    check_picture_size(args.output, width, height)
    codec = load_codec(args)
    if maker is not None and maker != codec.name:
        logger.warning(
            "%s was encoded by %s, and is decoded by %s: if the weights differ, the picture will be wrong.",
            args.tokens, maker, codec.name,
        )  # fmt: skip
    picture = codec.decode(tokens, args.mode, size)
    write_picture(picture, args.output)
    if not args.quiet:
        print(f"{args.output}: {picture.width} x {picture.height} px, from tokens in {metadata['encoding']}")
    return 0


def panel(args: argparse.Namespace) -> int:
    """A picture, its Gaussians before and after refinement, and its reconstruction, side by side."""
    check_picture_suffix(args.output)
    prepare_file(args.output, args.image)
    codec = load_codec(args)
    encoded = codec.encode(args.image, args.num_tokens)
    picture = codec.decode(encoded.tokens)
    summary = _summary(codec, encoded, quality(encoded.picture, picture))
    write_picture(_panel(encoded, picture, summary, args.style), args.output)
    if not args.quiet:
        print(f"{args.output}: {summary}")
    return 0


def _size(own: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int] | None:
    """(height, width) of a picture of the size `own` where a user gave both, one or neither."""
    if height is None and width is None:
        return None
    if height is None:
        height = max(1, round(own[0] * width / own[1]))
    if width is None:
        width = max(1, round(own[1] * height / own[0]))
    return height, width


def _panel(encoded: Encoded, picture: Image.Image, footer: str, style: str) -> Image.Image:
    scale = min(1.0, PANEL_SIDE / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    shown = [image.resize((width, height), Image.Resampling.LANCZOS) for image in (encoded.picture, picture)]
    initial, refined = (
        visualize_gaussians(tokens, shown[0], style, size=(height, width))[0]
        for tokens in (encoded.initial_tokens, encoded.tokens)
    )
    columns = [
        ("input", shown[0]),
        ("initial Gaussians", initial),
        ("refined Gaussians", refined),
        ("reconstruction", shown[1]),
    ]
    return side_by_side(columns, footer)


def _summary(codec: Codec, encoded: Encoded, values: dict[str, float | None]) -> str:
    return f"{quality_text(values)}   {encoded.tokens.num_tokens} tokens   {codec.name}"


def _sizes(tokens: GPSTokens) -> str:
    tiles = tokens.tile_grid[0] * tokens.tile_grid[1]
    split = f" ({tiles} tiles of {tokens.tokens_per_tile})" if tiles > 1 else ""
    return f"{tokens.num_tokens:,} tokens{split}, {tokens.num_floats:,} numbers, {tokens.num_bytes:,} bytes"
