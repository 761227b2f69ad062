"""Tokens in files, in ComfyUI's own folders."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io, ui

from . import installation
from .images import pil_to_image
from .sockets import GPSTokensSocket

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
            description="Writes tokens to a safetensors file in ComfyUI's output folder, completely or not at all.",
            inputs=[
                GPSTokensSocket.Input("tokens", tooltip="A batch goes into one file."),
                io.String.Input(
                    "filename_prefix",
                    default="gpstoken/tokens",
                    tooltip="Name within the output folder. A number is added; %year%, %month%, %day% are replaced.",
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
    def validate_inputs(cls, file: str) -> bool | str:
        try:
            find_file(file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str) -> object:
        status = find_file(file).stat()
        return (file, status.st_size, status.st_mtime_ns)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        installation.check()
        from gpstoken_diffusers import GPSTokens

        return io.NodeOutput(GPSTokens.load(find_file(file)))


def save_path(prefix: str) -> Path:
    """A new file in the output folder; its folders are made.

    Raises ValueError: a name that is empty, or leads out of the folder.
    """
    output = Path(folder_paths.get_output_directory()).resolve()
    wanted = (output / prefix).resolve()
    if wanted == output or output not in wanted.parents:
        raise ValueError(
            f"filename_prefix {prefix!r} leads out of ComfyUI's output folder. Give a name within it, such as "
            "gpstoken/tokens."
        )
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(output))
    return Path(folder, f"{name}_{counter:05}_{SUFFIX}")


def list_files() -> list[str]:
    """Files in the input folder, then in the output folder, as names that `find_file` takes."""
    names = []
    for mark, folder in _FOLDERS.items():
        root = folder()
        found = (
            os.path.relpath(os.path.join(parent, file), root).replace(os.sep, "/")
            for parent, _, files in os.walk(root, followlinks=True)
            for file in files
            if file.endswith(SUFFIX)
        )
        names += [name + mark for name in sorted(found)]
    return names


def find_file(name: str) -> Path:
    """The path of a file that `list_files` names.

    Raises ValueError: no such file there; so no name leads out of the folders.
    """
    if name not in list_files():
        raise ValueError(
            f"There is no tokens file {name!r} in ComfyUI's input or output folder. Save GPS Tokens writes such files; "
            "press R in the page to see new ones."
        )
    mark = " [output]" if name.endswith(" [output]") else ""
    return Path(_FOLDERS[mark](), name.removesuffix(mark))
