"""The commands, their options and help. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from .. import __version__

PRESETS = ("s64", "m128", "l256")  # the names of convert.PRESETS, which would import PyTorch
SAMPLERS = (  # as above
    "official-sde", "official-sde-heun", "official-ode", "official-ode-euler", "sde", "euler", "heun", "unipc", "dpm++",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
ENCODINGS = ("float32", "float16", "uint8")  # of token_files, which would import PyTorch too

_ENCODE = """\
Of a folder, every picture x.jpg becomes OUT/x.jpg.safetensors. Files appear whole or not at all, so a run that
was cut off goes on where it stopped. A picture that cannot be read is reported and left out; the exit code is
then 1. Several processes, GPUs or machines share the work under `accelerate launch`.

examples:
  gpstoken encode photo.jpg -o photo.safetensors
  gpstoken encode photo.jpg -o photo.safetensors --num-tokens 128
  gpstoken encode photo.jpg -o photo.safetensors --encoding uint8
  gpstoken encode photo.jpg -o photo.safetensors --importance face.png --importance-strength 4
  gpstoken encode photo.jpg -o photo.safetensors --polish 50
  gpstoken encode photos/ -o tokens/ --recursive --encoding uint8
  accelerate launch --multi_gpu -m gpstoken_diffusers encode photos/ -o tokens/
"""
_DECODE = """\
examples:
  gpstoken decode photo.safetensors -o photo.png
  gpstoken decode photo.safetensors -o photo.png --mode tile
  gpstoken decode photo.safetensors -o large.png --width 2048
  gpstoken decode panorama.safetensors -o panorama.png --memory-budget 200MB
"""
_RECONSTRUCT = """\
Every picture x.jpg becomes OUT/x.jpg.png; OUT/metrics.csv and OUT/metrics.json hold PSNR, SSIM, size,
tokens and seconds of all pictures in OUT, and the mean. Files appear whole or not at all, so a run that was
cut off goes on where it stopped. A picture that cannot be read is reported and left out; the exit code is
then 1.

examples:
  gpstoken reconstruct photos/ -o reconstructed/
  gpstoken reconstruct photos/ -o reconstructed/ --recursive --num-tokens 128 --device cuda
  gpstoken reconstruct photo.jpg -o reconstructed/ --model l256
"""
_PANEL = """\
examples:
  gpstoken panel photo.jpg -o panel.png
  gpstoken panel photo.jpg -o panel.png --style ellipses
"""
_GENERATE = """\
The model first draws where the Gaussians lie, then what they show. The same label, seed and settings give the
same pictures on every machine, up to rounding; picture k of a run is the same however many are made.

examples:
  gpstoken generate --label Food --seed 1 -n 16
  gpstoken generate --label Food --layout photo.png -n 4 -o food-in-the-shape-of-the-photo.png
  gpstoken generate --list-labels
"""
_DOWNLOAD = """\
Files come to the cache of huggingface_hub (HF_HOME says where), and a download that was cut off goes on. The
first use of --model l256 does the same.

examples:
  gpstoken download l256 m128
  gpstoken download https://huggingface.co/OWNER/REPO/blob/main/FILE.safetensors
"""
_CONVERT = """\
An official generator with its layouts becomes a pipeline, for DiffusionPipeline.from_pretrained and
gpstoken generate.

examples:
  gpstoken convert l256 -o gpstoken-l256
  gpstoken convert weights.safetensors -o gpstoken-m128 --preset m128 --dtype bfloat16
  gpstoken convert weights.safetensors -o mine --config config.json
  gpstoken convert generator.safetensors --autoencoder m128 --layouts initg.pickle -o gpstoken-imagenet
"""
_DEMO = """\
examples:
  gpstoken demo
  gpstoken demo -o somewhere --num-tokens 64
"""
_COMFYUI_INSTALL = """\
Copies the nodes, their help and example workflows to PATH/custom_nodes/gpstoken_diffusers_nodes; running it
again replaces them. Use the Python that ComfyUI runs in, and do it again after each upgrade of the package.

examples:
  gpstoken comfyui install ~/ComfyUI
"""
_TOP = """\
examples:
  gpstoken demo                                     a photograph to Gaussians and back, with the shipped model
  gpstoken encode photo.jpg -o photo.safetensors    then: gpstoken decode photo.safetensors -o photo.png
  gpstoken reconstruct photos/ -o reconstructed/    a folder, with PSNR and SSIM of each picture
  gpstoken generate --label Food -n 16              new pictures of a class
  gpstoken COMMAND --help                           options and examples of a command
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line.

    It sets `module` and `function`, which name what runs the command, and always `quiet` and `debug`.
    """
    parser = argparse.ArgumentParser(
        prog="gpstoken",
        description="Pictures as 2D Gaussians with texture, and back.",
        epilog=_TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gpstoken {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(commands, "demo", "commands", "turn the shipped photograph into Gaussians and back", _DEMO)
    _output(demo, "folder for the pictures and tokens (default: outputs)", default=Path("outputs"))
    _num_tokens(demo)
    _model_options(demo)

    encode = _command(commands, "encode", "commands", "a picture or a folder of pictures -> tokens", _ENCODE)
    encode.add_argument("image", metavar="PATH", type=Path, help="a picture, or a folder of pictures")
    _output(encode, "tokens file to write (.safetensors), or a folder for those of a folder")
    _num_tokens(encode)
    encode.add_argument(
        "--encoding",
        choices=ENCODINGS,
        help="how the file stores the numbers: uint8 takes about a quarter of float32's bytes and looks the same "
        "(default: every bit as the model gives it)",
    )
    encode.add_argument(
        "--importance",
        metavar="MASK",
        type=Path,
        help="gray picture of the same size: bright places get more tokens",
    )
    encode.add_argument(
        "--importance-strength",
        metavar="S",
        type=_number,
        default=1.0,
        help="at 1 (default) a white pixel of the mask adds as much as an average pixel's detail",
    )
    encode.add_argument(
        "--polish",
        metavar="STEPS",
        type=int,
        default=0,
        help="move the tokens by so many steps to where they are decoded to the picture more closely; 50 of them are "
        "worth some 1.5 dB, and take as long as a hundred decodings (default: 0)",
    )
    folder = encode.add_argument_group("for a folder")
    folder.add_argument("--recursive", action="store_true", help="also the pictures in folders below it")
    folder.add_argument("--overwrite", action="store_true", help="do all again, also what is done already")
    folder.add_argument(
        "--batch-size",
        metavar="B",
        type=int,
        default=8,
        help="pictures of one size that the networks take at once (default: 8); larger for a large GPU",
    )
    folder.add_argument(
        "--num-workers",
        metavar="K",
        type=int,
        help="threads that read and partition pictures meanwhile (default: half of the cores, at most 8)",
    )
    _model_options(encode)

    decode = _command(commands, "decode", "commands", "tokens -> picture", _DECODE)
    decode.add_argument("tokens", metavar="TOKENS", type=Path, help="file that `gpstoken encode` wrote")
    _output(decode, "picture to write; its suffix chooses the format")
    _mode(decode)
    for side in ("width", "height"):
        decode.add_argument(
            f"--{side}",
            metavar="PX",
            type=int,
            help=f"{side} of the picture; one of the two keeps the ratio (default: the encoded picture's size)",
        )
    _model_options(decode)

    summary = "a picture or a folder of pictures through the model and back, with metrics"
    reconstruct = _command(commands, "reconstruct", "reconstruct", summary, _RECONSTRUCT)
    reconstruct.add_argument("path", metavar="PATH", type=Path, help="a picture, or a folder of pictures")
    _output(reconstruct, "folder for the pictures and metrics")
    reconstruct.add_argument("--recursive", action="store_true", help="also the pictures in folders below PATH")
    reconstruct.add_argument("--overwrite", action="store_true", help="do all again, also what is done already")
    _num_tokens(reconstruct)
    _mode(reconstruct)
    _model_options(reconstruct)

    summary = "input | initial Gaussians | refined Gaussians | reconstruction, side by side"
    panel = _command(commands, "panel", "commands", summary, _PANEL)
    panel.add_argument("image", metavar="IMAGE", type=Path, help="the picture")
    _output(panel, "picture to write (default: panel.png)", default=Path("panel.png"))
    panel.add_argument(
        "--style", choices=("glow", "ellipses"), default="glow", help="look of the Gaussians (default: glow)"
    )
    _num_tokens(panel)
    _model_options(panel)

    generate = _command(commands, "generate", "generation", "new pictures of a class, in one grid", _GENERATE)
    generate.add_argument(
        "--label", metavar="CLASS", help="name or number of the class (default: no class in particular)"
    )
    generate.add_argument("--list-labels", action="store_true", help="print the model's classes, and do no more")
    generate.add_argument("--seed", metavar="S", type=int, default=0, help="of the first picture (default: 0)")
    generate.add_argument("-n", "--count", metavar="N", type=int, default=4, help="pictures to make (default: 4)")
    _output(generate, "picture to write (default: generated.png)", default=Path("generated.png"))
    generate.add_argument(
        "--layout", metavar="IMAGE", type=Path, help="take the layout of this picture instead of drawing one"
    )
    generate.add_argument("--steps", metavar="N", type=int, help="steps of the second stage (default: the sampler's)")
    generate.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: the model's own)")
    generate.add_argument(
        "--guidance", metavar="W", type=_number, help="how strongly to keep to the class (default: the model's, or 3)"
    )
    generate.add_argument(
        "--layout-guidance", metavar="W", type=_number, default=2.0, help="the same of the layout (default: 2)"
    )
    generate.add_argument("--num-tokens", metavar="N", type=int, help="tokens per picture (default: the model's)")
    generate.add_argument(
        "--model",
        metavar="MODEL",
        help="a pipeline's folder, or OWNER/NAME on the Hub (default: gpstoken-mini, which is part of this package)",
    )
    _hardware(generate)
    _common(generate)

    summary = "released tokenizers or other official files from the Hub to this machine"
    download = _command(commands, "download", "conversion", summary, _DOWNLOAD)
    download.add_argument(
        "files", metavar="MODEL", nargs="+", help=f"{', '.join(PRESETS)}, OWNER/REPO/FILE, or an address of the Hub"
    )
    _common(download)

    summary = "official checkpoint -> folder for from_pretrained"
    convert = _command(commands, "convert", "conversion", summary, _CONVERT)
    convert.add_argument("checkpoint", metavar="OFFICIAL", help="official .safetensors file, or its name on the Hub")
    _output(convert, "folder to write")
    _preset(convert, "its configuration (default: by its shapes, else by the file's name)")
    convert.add_argument("--config", metavar="JSON", type=Path, help="constructor arguments of a model of other sizes")
    convert.add_argument(
        "--autoencoder", metavar="MODEL", help="of a generator: its tokenizer, a file as OFFICIAL (default: m128)"
    )
    convert.add_argument("--layouts", metavar="PICKLE", type=Path, help="of a generator: the official initg.pickle")
    convert.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    convert.add_argument("--overwrite", action="store_true", help="replace a folder that convert wrote before")
    _common(convert)

    comfyui = commands.add_parser("comfyui", help="nodes for ComfyUI", description="Nodes for ComfyUI.")
    actions = comfyui.add_subparsers(title="commands", metavar="COMMAND", required=True)
    install = _command(actions, "install", "comfyui", "put the nodes into a ComfyUI", _COMFYUI_INSTALL)
    install.add_argument("path", metavar="PATH", type=Path, help="ComfyUI's folder, the one with custom_nodes in it")
    _common(install)

    summary = "which native libraries exist, which one each operation uses, how to get faster ones"
    _common(_command(commands, "doctor", "doctor", summary))
    return parser


def _command(commands, name: str, module: str, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(module=module, function=name)
    return parser


def _output(parser: argparse.ArgumentParser, what: str, default: Path | None = None) -> None:
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=default is None, default=default, help=what
    )


def _num_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-tokens",
        metavar="N",
        type=int,
        help="tokens per tile; pictures larger than the model's are cut into tiles (default: the model's)",
    )


def _mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("merge", "tile"),
        help="decode pictures of several tiles as one, without seams, or tile by tile (default: the model's)",
    )


def _preset(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument("--preset", choices=PRESETS, help=what)


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="s64, m128 or l256, a released tokenizer, fetched at its first use; a folder of save_pretrained or "
        "`gpstoken convert`, or OWNER/NAME, a repository of the Hub that holds one; an official .safetensors file, or "
        "OWNER/REPO/FILE on the Hub (default: gpstoken-mini, which is part of this package)",
    )
    _preset(group, "configuration of an official file, where its shapes and name do not tell")
    _hardware(group)
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory that the networks may work in, such as 500MB or 2GB, beside the weights and the picture itself: "
        "less is slower, more hardly faster (default: what four tiles of a large picture take)",
    )
    _common(parser)


def _hardware(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps (default: auto = cuda where there is one, else cpu)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="precision of the networks (default: auto = bfloat16 on a GPU that has it, else float32)",
    )


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    parser.add_argument("--debug", action="store_true", help="show where an error came from (for bug reports)")


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, not {text!r}")
    return number


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:N or mps, not {text!r}")
    return text
