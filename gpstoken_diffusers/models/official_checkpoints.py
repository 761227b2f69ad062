"""Renames official checkpoint files to this package's names, which only this file knows both of.

The research code (github.com/xtudbxk/GPSToken) stores an autoencoder as safetensors with names such as
`attnblocks.0.attn1.in_proj_weight`, and a generator with SiT's names under `ema_model.`. Nothing here is unpickled:
other file types are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..safe_files import open_safetensors

# What the three released configurations share, and where they differ. Values of `AutoencoderGPSToken`'s constructor.
_RELEASED = {
    "sample_size": 256,
    "map_size": 64,
    "support": 3.0,
    "min_region_size": 8,
    "entropy_exponent": 2.5,
    "stem_channels": 128,
    "roi_size": 8,
    "hidden_size": 512,
    "num_layers": 30,
    "num_attention_heads": 8,
    "decoder_block_out_channels": (128, 256, 512),
    "decoder_num_layers": 3,
}
PRESETS = {
    "s64": {**_RELEASED, "num_tokens": 64, "texture_channels": 16, "decode_mode": "merge"},
    "m128": {**_RELEASED, "num_tokens": 128, "texture_channels": 16, "decode_mode": "merge"},
    "l256": {**_RELEASED, "num_tokens": 256, "texture_channels": 32, "decode_mode": "tile"},
}


# SiT-XL/2-gs and SiT-S/2-gs, the released second stage over M128's tokens: sizes, and how its latents are scaled (five
# geometry residuals, then the texture). Values of `GPSTokenTransformerModel`'s constructor.
_RELEASED_GENERATOR = {
    "texture_channels": 16,
    "num_tokens": 128,
    "num_classes": 1000,
    "learn_sigma": True,
    "position_table": True,
    "latents_mean": (
        -0.0211, -0.0196, 0.0107, -0.0052, -0.0044,
        1.8017, 2.4036, 2.0145, 1.2402, -4.2579, -1.2646, -3.0395, 2.2928,
        3.2168, -0.1431, 0.1600, 1.3924, 3.2345, 1.6994, 0.8237, 0.3222,
    ),
    "latents_std": (
        0.0121, 0.0108, 0.2533, 0.0119, 0.0114,
        2.7334, 2.6400, 2.7963, 2.9325, 2.8337, 2.8269, 3.1082, 3.1412,
        2.8038, 2.6501, 2.6163, 2.4718, 2.6958, 2.8157, 2.4744, 2.8200,
    ),
}  # fmt: skip
GENERATOR_PRESETS = {
    "xl": {**_RELEASED_GENERATOR, "hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16},
    "s": {**_RELEASED_GENERATOR, "hidden_size": 384, "num_layers": 12, "num_attention_heads": 6},
}

# Prefixes under which a training run may store the model; the averaged weights are the ones to use.
_MODEL_PREFIXES = ("ema_model.", "model.", "module.", "")

# Present in the official files and never used by the official forward pass.
_UNUSED = re.compile(r"preprocess_img\.[12]\.temb_proj\.(weight|bias)")

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"preprocess_img\.0\.(\w+)", r"stem.conv_in.\1"),
    (r"preprocess_img\.([12])\.(norm[12]|conv[12])\.(\w+)", r"stem.blocks.<\1-1>.\2.\3"),
    (r"roialign_layer\.(weight|bias)", r"refiner.region_reader.proj.\1"),
    (r"gps_embed\.weight", r"refiner.token_embedding"),
    (r"gps_embed_layer\.([02])\.(\w+)", r"refiner.geometry_embedding.\1.\2"),
    (r"to_gps\.0\.(\w+)", r"refiner.geometry_head.\1"),
    (r"to_gps\.1\.(\w+)", r"refiner.texture_head.\1"),
    (r"attnblocks\.(\d+)\.ln([12])\.(\w+)", r"refiner.blocks.\1.norm\2.\3"),
    (r"attnblocks\.(\d+)\.attn1\.out_proj\.(\w+)", r"refiner.blocks.\1.attn.to_out.\2"),
    (r"attnblocks\.(\d+)\.mlp\.([02])\.(\w+)", r"refiner.blocks.\1.ff.\2.\3"),
    (r"decoder\.(conv_in|conv_out|norm_out)\.(\w+)", r"decoder.\1.\2"),
    (r"decoder\.mid\.block_([12])\.(\w+)\.(\w+)", r"decoder.mid_block_\1.\2.\3"),
    (r"decoder\.mid\.attn_1\.norm\.(\w+)", r"decoder.mid_attention.norm.\1"),
    (r"decoder\.mid\.attn_1\.([qkv])\.(\w+)", r"decoder.mid_attention.to_\1.\2"),
    (r"decoder\.mid\.attn_1\.proj_out\.(\w+)", r"decoder.mid_attention.to_out.\1"),
    (r"decoder\.up\.(\d+)\.block\.(\d+)\.nin_shortcut\.(\w+)", r"decoder.stages.<L-\1>.blocks.\2.conv_shortcut.\3"),
    (r"decoder\.up\.(\d+)\.block\.(\d+)\.(norm[12]|conv[12])\.(\w+)", r"decoder.stages.<L-\1>.blocks.\2.\3.\4"),
    (r"decoder\.up\.(\d+)\.upsample\.conv\.(\w+)", r"decoder.stages.<L-\1>.conv_up.\2"),
)
_PATTERNS = tuple((re.compile(old), new) for old, new in _RENAMES)
_COUNTER = re.compile(r"<(L|\d+)-(\d+)>")


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty or truncated file, or one of another format (a pickle, for one, is never opened).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    with open_safetensors(path, advice="Download or copy it again.") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _model_prefix(names: set[str]) -> str | None:
    for prefix in _MODEL_PREFIXES:
        if f"{prefix}gps_embed.weight" in names or f"{prefix}preprocess_img.0.weight" in names:
            return prefix
    return None


def convert_autoencoder(official: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Renames an official autoencoder's tensors to those of `AutoencoderGPSToken`.

    Args:
        official: the tensors of the file. If the model lies under a prefix (`ema_model.`, `model.`, `module.`), only
            that part is taken, averaged weights first; what a trainer keeps beside a model is then left out.
        source: the file's name, for messages.

    Returns: our names to tensors; shapes follow the file, so a caller must still compare them with the model's.

    Raises ValueError: the file holds no GPSToken autoencoder, or names that such a model does not have.
    """
    prefix = _model_prefix(set(official))
    if prefix is None:
        some = ", ".join(sorted(official)[:5]) or "nothing"
        hint = ""
        if any("adaLN_modulation" in name for name in official):
            hint = " It looks like a GPSToken generator (SiT), which is not an autoencoder."
        raise ValueError(
            f"{source} holds no GPSToken autoencoder: 'gps_embed.weight' is missing.{hint} It starts with: {some}."
        )
    tensors = {name[len(prefix) :]: tensor for name, tensor in official.items() if name.startswith(prefix)}
    levels = [int(match[1]) for name in tensors if (match := re.match(r"decoder\.up\.(\d+)\.", name))]
    last_level = max(levels, default=0)

    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    pools: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if _UNUSED.fullmatch(name):
            continue
        if match := re.fullmatch(r"attnblocks\.(\d+)\.roimlp\.(weight|bias)", name):
            pools.setdefault(int(match[1]), {})[match[2]] = tensor
        elif match := re.fullmatch(r"attnblocks\.(\d+)\.attn1\.in_proj_(weight|bias)", name):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"refiner.blocks.{match[1]}.attn.to_{part}.{match[2]}"] = piece.clone()
        elif (new := _rename(name, last_level)) is not None:
            # The official 1x1 convolution over RoI cells is our linear layer over their channels.
            converted[new] = tensor.flatten(1) if name == "roialign_layer.weight" else tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{source} holds {len(unknown)} tensors that a GPSToken autoencoder does not have: "
            + ", ".join(sorted(unknown)[:20])
            + (" ..." if len(unknown) > 20 else "")
        )
    for kind, name in (("weight", "pool_weight"), ("bias", "pool_bias")):
        rows = [pools[index][kind].reshape(1, -1) for index in sorted(pools) if kind in pools[index]]
        if rows and len({row.shape for row in rows}) == 1:
            stacked = torch.cat(rows)
            converted[f"refiner.region_reader.{name}"] = stacked if kind == "weight" else stacked[:, 0]
    return converted


def _rename(name: str, last_level: int) -> str | None:
    for pattern, replacement in _PATTERNS:
        if match := pattern.fullmatch(name):
            new = match.expand(replacement)
            # <1-1> counts from zero; <L-0> counts the decoder's levels from the other end.
            return _COUNTER.sub(lambda m: str((last_level if m[1] == "L" else int(m[1])) - int(m[2])), new)
    return None


def recognise_preset(converted: dict[str, Tensor], source: str, preset: str | None = None) -> tuple[str, str]:
    """Which released configuration an autoencoder's file of full-size weights is.

    L256 has 32 texture channels. S64 and M128 have 16 and do not differ in any shape, so the caller says which, or
    the file's name does.

    Args:
        converted: the tensors, in our names.
        source: the file's name.
        preset: "s64", "m128" or "l256", when the caller knows.

    Returns: (preset, reason); the reason is a phrase for the user.

    Raises ValueError: no texture head, an unknown preset, one that contradicts the shapes, or nothing that tells S64
    from M128.
    """
    head = converted.get("refiner.texture_head.weight")
    if head is None:
        raise ValueError(f"{source} lacks 'to_gps.1.weight', the texture head: it is not a whole autoencoder.")
    texture_channels = head.shape[0]
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        expected = PRESETS[preset]["texture_channels"]
        if expected != texture_channels:
            raise ValueError(f"preset {preset!r} has {expected} texture channels, but {source} has {texture_channels}.")
        return preset, "as asked for"
    fitting = [name for name, values in PRESETS.items() if values["texture_channels"] == texture_channels]
    if len(fitting) == 1:
        return fitting[0], f"by its {texture_channels} texture channels"
    stem = Path(source).name.lower()
    named = [name for name in fitting if re.search(rf"(?<![a-z0-9]){name}(?![0-9])", stem)]
    if len(named) == 1:
        return named[0], f"by the file's name {stem!r}"
    raise ValueError(
        f"{source} has {texture_channels} texture channels, which fits {' and '.join(fitting) or 'no preset'}: "
        f"the weights do not tell them apart. Say which one, for example preset={(fitting or ['l256'])[-1]!r}."
    )


def check_against_model(converted: dict[str, Tensor], expected: dict[str, torch.Size], source: str) -> None:
    """Raises ValueError listing every tensor that is missing, left over or of another shape than the model's."""
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in converted]
    for name, tensor in converted.items():
        if name not in expected:
            problems.append(f"not in the model: {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            problems.append(f"shape of {name}: expected {list(expected[name])}, file has {list(tensor.shape)}")
    if problems:
        shown = "\n  ".join(problems[:30])
        more = f"\n  and {len(problems) - 30} more" if len(problems) > 30 else ""
        raise ValueError(
            f"{source} does not fit the model ({len(problems)} differences):\n  {shown}{more}\n"
            "If it is a model of other sizes, give its configuration: from_single_file(path, config={...})."
        )


def read_config_file(path: str | os.PathLike) -> dict:
    """Reads a JSON configuration of `AutoencoderGPSToken`; ValueError for anything else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object of constructor arguments, got {type(values).__name__}.")
    return values


_GENERATOR_RENAMES = (
    (r"x_embedder\.proj\.(\w+)", r"token_embedding.\1"),
    (r"cond_embedder\.([02])\.(\w+)", r"layout_embedding.\1.\2"),
    (r"t_embedder\.mlp\.([02])\.(\w+)", r"time_embedding.\1.\2"),
    (r"y_embedder\.embedding_table\.weight", r"class_embedding.weight"),
    (r"pos_embed", r"positions"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attn.to_out.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.ff.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.ff.2.\2"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"blocks.\1.modulation.\2"),
    (r"final_layer\.linear\.(\w+)", r"head.proj.\1"),
    (r"final_layer\.adaLN_modulation\.1\.(\w+)", r"head.modulation.\1"),
)
_GENERATOR_PATTERNS = tuple((re.compile(old), new) for old, new in _GENERATOR_RENAMES)


def convert_generator(official: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Renames an official generator's tensors (SiT-XL/2-gs and its like) to those of `GPSTokenTransformerModel`.

    Args and returns as [`convert_autoencoder`]; of several models in the file, the averaged one is taken.

    Raises ValueError: the file holds no such generator, or names that such a model does not have.
    """
    prefix = next((prefix for prefix in _MODEL_PREFIXES if f"{prefix}x_embedder.proj.weight" in official), None)
    if prefix is None:
        some = ", ".join(sorted(official)[:5]) or "nothing"
        hint = " It looks like a GPSToken autoencoder." if _model_prefix(set(official)) is not None else ""
        raise ValueError(
            f"{source} holds no GPSToken generator: 'x_embedder.proj.weight' is missing.{hint} It starts with: {some}."
        )
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in official.items():
        if not name.startswith(prefix):
            continue
        name = name[len(prefix) :]
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"blocks.{match[1]}.attn.to_{part}.{match[2]}"] = piece.clone()
            continue
        renamed = (match.expand(new) for old, new in _GENERATOR_PATTERNS if (match := old.fullmatch(name)))
        if (new := next(renamed, None)) is None:
            unknown.append(name)
        else:
            # The official embedding of a token is a convolution of 1 x 1: a linear layer.
            converted[new] = tensor.flatten(1) if name == "x_embedder.proj.weight" else tensor
    if unknown:
        raise ValueError(
            f"{source} holds {len(unknown)} tensors that a GPSToken generator does not have: "
            + ", ".join(sorted(unknown)[:20])
            + (" ..." if len(unknown) > 20 else "")
        )
    return converted


def recognise_generator_preset(converted: dict[str, Tensor], source: str, preset: str | None = None) -> tuple[str, str]:
    """Which released size a generator's file is, by its width. Args, returns and errors as [`recognise_preset`]."""
    width = converted["token_embedding.weight"].shape[0]
    if preset is not None:
        if preset not in GENERATOR_PRESETS:
            raise ValueError(f"preset must be one of {', '.join(GENERATOR_PRESETS)}, got {preset!r}.")
        if GENERATOR_PRESETS[preset]["hidden_size"] != width:
            raise ValueError(
                f"preset {preset!r} is {GENERATOR_PRESETS[preset]['hidden_size']} wide, but {source} is {width} wide."
            )
        return preset, "as asked for"
    for name, values in GENERATOR_PRESETS.items():
        if values["hidden_size"] == width:
            return name, f"by its width of {width}"
    raise ValueError(
        f"{source} is {width} wide, which fits no preset ({', '.join(GENERATOR_PRESETS)}). "
        "Give its configuration: from_single_file(path, config={...})."
    )


@dataclass(frozen=True)
class OfficialFormat:
    """How one kind of official file becomes one kind of model.

    Attributes:
        presets: constructor arguments of the released sizes.
        file_name: under which a size was released, with a place for `{preset}`.
        convert: (tensors, source) -> tensors in our names.
        recognise_preset: (converted tensors, source, preset or None) -> (preset, reason).
    """

    presets: dict[str, dict]
    file_name: str
    convert: Callable[[dict[str, Tensor], str], dict[str, Tensor]]
    recognise_preset: Callable[[dict[str, Tensor], str, str | None], tuple[str, str]]


AUTOENCODER = OfficialFormat(PRESETS, "gpstoken_{preset}.safetensors", convert_autoencoder, recognise_preset)
GENERATOR = OfficialFormat(GENERATOR_PRESETS, "generator.safetensors", convert_generator, recognise_generator_preset)
