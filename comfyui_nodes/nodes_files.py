"""Tokens in files, in ComfyUI's own folders."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io, ui

from . import installation
from .images import pil_to_image
from .listing import names_below
from .sockets import GPSTokensSocket, searched_as

SUFFIX = ".safetensors"
_FOLDERS = {"": folder_paths.get_input_directory, " [output]": folder_paths.get_output_directory}


class SaveGPSTokens(io.ComfyNode):
    """Tokens to a file in the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveGPSTokens",
            display_name="Save GPS Tokens",
            category="GPSToken/files",
            **searched_as(),
            description="Writes tokens to a safetensors file in ComfyUI's output folder, completely or not at all.",
            inputs=[
                GPSTokensSocket.Input("tokens", tooltip="A batch goes into one file."),
                io.String.Input(
                    "filename_prefix",
                    default="gpstoken/tokens",
                    tooltip="Name within the output folder. A number is added; %date:yyyy-MM-dd%, %year% are replaced.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, tokens, filename_prefix) -> io.NodeOutput:
        from gpstoken_diffusers import visualize_gaussians

        path = save_path(filename_prefix)
        tokens.save(path)
        pictures = pil_to_image(visualize_gaussians(tokens, style="glow"))
        return io.NodeOutput(ui=ui.PreviewImage(pictures, cls=cls))


class LoadGPSTokens(io.ComfyNode):
    """Tokens from a file in the input or output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadGPSTokens",
            display_name="Load GPS Tokens",
            category="GPSToken/files",
            **searched_as(),
            description="Reads tokens that Save GPS Tokens wrote, from ComfyUI's input or output folder.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files(),
                    tooltip="A file of tokens. Press R to see files that were added meanwhile.",
                ),
            ],
            outputs=[
                GPSTokensSocket.Output(
                    "tokens_out", display_name="tokens", tooltip="For GPS Decode, with the model that made them."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        try:
            if file is not None:  # else it comes from another node, and is not known yet
                find_file(file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> object:
        # Of a name that another node gives, nothing is known but that it is one of these.
        names = [file] if file is not None else list_files()
        statuses = [(name, find_file(name).stat()) for name in names]
        return [(name, status.st_size, status.st_mtime_ns) for name, status in statuses]

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        installation.check()
        from gpstoken_diffusers import GPSTokens

        return io.NodeOutput(GPSTokens.load(find_file(file)))


def save_path(prefix: str) -> Path:
    """A new file in the output folder; its folders are made.

    Raises ValueError: a name that is empty, or leads out of the folder.
    """
    prefix = _DATE.sub(lambda found: _dated(found[1]), prefix)
    output = Path(folder_paths.get_output_directory()).resolve()
    wanted = (output / prefix).resolve()
    if wanted == output or output not in wanted.parents:
        raise ValueError(
            f"filename_prefix {prefix!r} leads out of ComfyUI's output folder. Give a name within it, such as "
            "gpstoken/tokens."
        )
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(output))
    return Path(folder, f"{name}_{counter:05}_{SUFFIX}")


# As the page replaces it in the names of Save Image.
_DATE = re.compile(r"%date:([^%]*)%")
_DATE_PART = re.compile("yyyy|yy|MM?|dd?|hh?|mm?|ss?")
_DATE_CODES = {"yyyy": "%Y", "yy": "%y", "M": "%m", "d": "%d", "h": "%H", "m": "%M", "s": "%S"}


def _dated(form: str) -> str:
    """A form such as yyyy-MM-dd_hh.mm.ss with the time of now; MM is 03 in March, M is 3."""
    now = time.localtime()

    def shown(part: re.Match) -> str:
        number = time.strftime(_DATE_CODES.get(part[0], _DATE_CODES.get(part[0][0])), now)
        return number if len(part[0]) > 1 else str(int(number))

    return _DATE_PART.sub(shown, form)


def list_files() -> list[str]:
    """Files in the input folder, then in the output folder, as names that `find_file` takes."""
    return [name + mark for mark, folder in _FOLDERS.items() for name in names_below(folder(), [SUFFIX])]


def find_file(name: str) -> Path:
    """The path of a file that `list_files` names.

    Raises ValueError: no such file there; so no name leads out of the folders.
    """
    mark = " [output]" if name.endswith(" [output]") else ""
    inner = name.removesuffix(mark)
    root = _FOLDERS[mark]()
    path = Path(root, inner)
    # As `list_files` writes it: below the folder, without ways up. Links below it are the user's own.
    written = inner == os.path.normpath(inner).replace(os.sep, "/") and ".." not in inner.split("/")
    if not (written and path.is_relative_to(root) and inner.lower().endswith(SUFFIX) and path.is_file()):
        raise ValueError(
            f"There is no tokens file {name!r} in ComfyUI's input or output folder. Save GPS Tokens writes such files; "
            "press R in the page to see new ones."
        )
    return path
