"""The Inception-v3 of 2015-12-05 that Frechet distances are computed with, differentiable in its picture."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .weight_files import CACHE

FILES = (
    "weights-inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6401da91.pth",
    "pt_inception-2015-12-05-6726825d.pth",
)
"""The same weights as torch-fidelity and pytorch-fid publish them."""
SIDE = 299
"""Side in pixels of the pictures that the network was trained on."""


class InceptionV3(nn.Module):
    """torch-fidelity's Inception-v3 up to its last average: Szegedy et al. (2015), arXiv 1512.00567.

    torch-fidelity itself takes whole levels only and passes no gradient on. Here its layers read floating point
    numbers.

    Args:
        weights: of one of `FILES`.
        source: where they come from, for messages.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: another network's weights.
    """

    def __init__(self, weights: dict[str, Tensor], source: str):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("Inception-v3 needs the package torch-fidelity: pip install torch-fidelity") from error
        # torch-fidelity unpickles anything in a file: it gets a file in memory with nothing but these tensors.
        file = io.BytesIO()
        torch.save(weights, file)
        file.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
        except RuntimeError as error:
            raise ValueError(f"{source} is not Inception-v3 of 2015-12-05: {str(error)[:400]}") from error
        del self.network.fc
        for layer in self.network.modules():
            if isinstance(layer, BasicConv2d):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()

    def forward(self, levels: Tensor) -> Tensor:
        """(B, 3, H, W), 0 to 255, of any size -> (B, 2048), at least 0."""
        # TensorFlow's graph subtracts 128 and divides by 128.
        maps = (resize_like_tensorflow(levels, SIDE) - 128) / 128
        maps = maps.contiguous(memory_format=torch.channels_last)
        for layer in self.network.children():
            maps = layer(maps)
        return maps.flatten(1)


def find_inception_file(cache: Path = CACHE) -> Path:
    """The file of weights in `cache` or in PyTorch's download cache.

    Raises:
        FileNotFoundError: it is in neither.
    """
    folders = (cache.expanduser(), Path(torch.hub.get_dir()) / "checkpoints")
    for path in (folder / name for folder in folders for name in FILES):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"there is no {' or '.join(FILES)} in {folders[0]} or {folders[1]}. The package index does not carry them: "
        "the projects torch-fidelity and pytorch-fid publish them as release files. Copy one there, or give its path "
        "as the weights"
    )


def resize_like_tensorflow(pictures: Tensor, side: int) -> Tensor:
    """Bilinear (B, C, H, W) -> (B, C, side, side) as TensorFlow 1 did: pixel 0 stays, without smoothing.

    Pixel i of the result lies at i * H / side, without PyTorch's half pixel. torch-fidelity's function gathers
    pixels, so its gradients differ from run to run on a GPU; the gradients of matrix products do not.
    """
    # In bfloat16 the levels would lose their last digits.
    with torch.autocast(pictures.device.type, enabled=False):
        rows, columns = (_bilinear(length, side).to(pictures) for length in pictures.shape[-2:])
        return rows @ (pictures @ columns.T)


def _bilinear(length: int, side: int) -> Tensor:
    """(side, length), what each pixel of a line contributes to each of the resized one."""
    # In float32, as TensorFlow counts: with more digits some places fall between other pixels.
    places = torch.arange(side, dtype=torch.float32) * torch.tensor(length / side, dtype=torch.float32)
    low = places.long()
    share = places - low
    matrix = torch.zeros(side, length)
    matrix.scatter_add_(1, low[:, None], (1 - share)[:, None])
    matrix.scatter_add_(1, (low + 1).clamp(max=length - 1)[:, None], share[:, None])
    return matrix
