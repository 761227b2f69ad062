"""The perceptual distances: what they must be for any weights, and their values with the published ones."""

from __future__ import annotations

import io
import zipfile

import lpips
import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
import torchvision
from perceptual_zoo import build, files, head_weights, inception_weights, noise, photographs, trunk_weights
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from gpstoken_diffusers.evaluation.efficientnet import WEIGHTS, WHEEL
from gpstoken_diffusers.evaluation.inception import resize_like_tensorflow
from gpstoken_diffusers.evaluation.perceptual import LPIPS, NAMES, InceptionFeatures, perceptual_distance, unit
from gpstoken_diffusers.evaluation.trunks import CHANNELS
from gpstoken_diffusers.evaluation.weight_files import CACHE

# The official Inception is the other one at other levels.
ALL = pytest.mark.parametrize("name", [name for name in NAMES if name != "inception-official"])
TRUNKS = pytest.mark.parametrize("trunk", CHANNELS)


# ------------------------------------------------------------------------------------------------ what all of them are


@ALL
def test_equal_pictures_have_no_distance_and_order_does_not_matter(name):
    distance, a = build(name), photographs(48)
    b = noise(a, 0.1)
    assert distance(a, a).tolist() == [0, 0]
    together = distance(a, b)
    assert together.dtype == torch.float32 and (together > 0).all()
    assert torch.equal(together, distance(b, a))
    alone = torch.cat([distance(a[i : i + 1], b[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-7)  # float32, other sums in a batch
    # A target can be looked at once.
    assert torch.equal(distance(b, distance.forward_features(a)), together)


@ALL
def test_the_gradient_is_the_slope_and_the_network_is_frozen(name):
    distance = build(name).double()
    assert not any(module.training for module in nn.ModuleList([distance]).train()[0].modules())
    try:
        a = photographs(32)[:1].double()
        b = noise(a, 0.2).requires_grad_()
        distance(b, a).sum().backward()
        assert b.grad.isfinite().all()
        assert not any(parameter.requires_grad for parameter in distance.parameters())
        for seed in range(2):
            direction = torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)).double()
            step = 1e-8  # at larger ones, ReLUs and maxima change sides on the way
            with torch.no_grad():
                slope = (distance(b + step * direction, a) - distance(b - step * direction, a)).sum() / (2 * step)
            # Rounding: 1e-16 of a distance by 1e-8, beside slopes of 0.01 and more; 5e-7 was seen.
            assert (b.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
    finally:
        distance.float()


def test_vanishing_vectors_give_no_nan():
    """A root of 0 has no slope, and the square of 1e-25 is 0 in float32."""
    maps = torch.tensor([[0.0, 1e-25, 3.0], [0.0, 0.0, 4.0]]).reshape(1, 2, 1, 3).requires_grad_()
    units = unit(maps)
    torch.testing.assert_close(units.flatten(), torch.tensor([0, 0, 0.6, 0, 0, 0.8]))
    (gradient,) = torch.autograd.grad(units[:, 0].sum(), maps)
    assert gradient.isfinite().all()
    # Of x / sqrt(x^2 + y^2): y^2 / r^3 and -x y / r^3.
    torch.testing.assert_close(gradient[0, :, 0, 2], torch.tensor([16 / 125, -12 / 125]))


@ALL
def test_flat_pictures_have_finite_gradients(name):
    distance = build(name)
    flat = torch.stack([torch.full((3, 40, 40), level) for level in (-1.0, 0.0, 1.0)]).requires_grad_()
    for other in (flat.detach(), photographs(40)[[0, 1, 0]]):
        (gradient,) = torch.autograd.grad(distance(flat, other).sum(), flat)
        assert gradient.isfinite().all()


@ALL
def test_more_noise_and_more_blur_are_further_away(name):
    distance, a = build(name), photographs(96)
    with torch.no_grad():
        target = distance.forward_features(a)
        noisy = [distance(noise(a, strength), target) for strength in (0.02, 0.05, 0.1, 0.2)]
        kernels = (3, 5, 9, 15)
        blurred = [distance(torchvision.transforms.functional.gaussian_blur(a, size), target) for size in kernels]
    for row in (noisy, blurred):
        assert (torch.stack(row).diff(dim=0) > 0).all(), row


@ALL
def test_bfloat16_pictures_and_autocast_are_compared_in_float32(name):
    distance, a = build(name), photographs(64)
    b = noise(a, 0.3)
    exact = distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        rough = distance(a, b)
    assert rough.dtype == distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    if distance.follows_autocast:
        # 8 bits per number, averaged over many: 2 % at most was seen.
        torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)
    else:
        assert torch.equal(rough, exact)


def test_wrong_pictures_are_named():
    distance, a = build("lpips-alex"), photographs(48)
    cases = [
        (a, a[:1], ValueError, r"one shape .* \(2, 3, 48, 48\) and \(1, 3, 48, 48\)"),
        (a[:1], distance.forward_features(a), ValueError, "of other pictures"),
        (a[0], a[0], ValueError, "must have the shape"),
        (a[:, :1], a[:, :1], ValueError, "must have the shape"),
        (a[:0], a[:0], ValueError, "of at least"),
        (a.byte(), a.byte(), TypeError, "floating point numbers in .-1, 1., not torch.uint8"),
        (127.5 * (a + 1), a, ValueError, "divide 0..255 by 127.5"),
        (a, 127.5 * (a + 1), ValueError, "divide 0..255 by 127.5"),
    ]
    for one, other, error, message in cases:
        with pytest.raises(error, match=message):
            distance(one, other)


@ALL
def test_the_smallest_picture_is_the_smallest(name):
    distance = build(name)
    side = distance.smallest
    a = photographs(64)
    assert distance(a[..., :side, :], -a[..., :side, :]).isfinite().all()
    if side > 1:
        with pytest.raises(ValueError, match=f"at least {side} x {side} pixels"):
            distance(a[..., : side - 1], a[..., : side - 1])
        distance.smallest = 1  # without the check, a layer fails
        try:
            with pytest.raises(RuntimeError):
                distance(a[..., : side - 1], a[..., : side - 1])
        finally:
            distance.smallest = side


def test_labels_say_what_it_is():
    labels = {name: build(name).label for name in ("lpips-vgg", "lpips-alex", "inception")}
    assert list(labels.values()) == ["LPIPS (VGG)", "LPIPS (AlexNet)", "Inception-v3 feature MSE"]
    official = perceptual_distance("inception-official", files() / "inception")
    assert official.label == "Inception-v3 feature MSE (levels to 510)"
    with pytest.raises(ValueError, match="must be one of lpips-vgg, .* not 'ssim'"):
        perceptual_distance("ssim")


# ------------------------------------------------------------------------------------------------ values


def made_up_pictures() -> tuple[Tensor, Tensor]:
    """Two pairs (2, 3, 64, 72): waves against shifted waves with a fine grating, squares against the same smoothed."""
    y, x = torch.meshgrid(torch.arange(64.0).double(), torch.arange(72.0).double(), indexing="ij")
    waves = 0.8 * torch.stack([(0.3 * x + 0.1 * y).sin(), (0.2 * y - 0.05 * x).cos(), (0.01 * x * y).sin()])
    squares = torch.stack([((x // 8 + y // 8) % 2), ((x // 5) % 2), ((y // 11) % 2)]) * 1.6 - 0.8
    a = torch.stack([waves, squares])
    b = torch.stack([waves.roll(2, dims=2) + 0.15 * (1.3 * x).cos(), F.avg_pool2d(squares, 3, 1, 1)])
    return a.float(), b.float()


@pytest.mark.parametrize(
    "name, expected",
    [("stlpips-vgg", (0.334785941, 0.244474904)), ("stlpips-alex", (0.0577054518, 0.0772223944))],
)
def test_st_lpips_is_that_of_its_package(name, expected):
    """Of the package stlpips-pytorch 0.0.2, computed in float64."""
    a, b = made_up_pictures()
    distance = build(name)
    # float32: 2e-7 was seen here; other processors sum in another order.
    assert distance(a, b).tolist() == pytest.approx(expected, rel=1e-5)
    try:
        # The channels' weights are kept as their roots in float32.
        assert distance.double()(a, b).tolist() == pytest.approx(expected, rel=1e-7)
    finally:
        distance.float()


@TRUNKS
def test_lpips_is_that_of_its_package(trunk, tmp_path):
    """With made-up weights in torchvision's file, and as one file by the package's names."""
    package = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    weights, heads = trunk_weights(trunk), head_weights(trunk)
    places = [name for name in package.state_dict() if name.startswith("net.")]
    own = {name: weights[f"features.{name.split('.', 2)[2]}"] for name in places}
    package.load_state_dict(own | heads, strict=False)
    torch.save(weights | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / "trunk.pth")
    torch.save(heads, tmp_path / "heads.pth")
    torch.save(package.state_dict(), tmp_path / "whole.pth")
    distance = LPIPS(trunk, tmp_path / "trunk.pth", tmp_path / "heads.pth")
    a, b = made_up_pictures()
    # float32, in another order of sums.
    torch.testing.assert_close(distance(a, b), package(a, b).flatten(), rtol=1e-5, atol=0)
    assert torch.equal(LPIPS(trunk, tmp_path / "whole.pth")(a, b), distance(a, b))


def test_inception_is_that_of_torch_fidelity():
    """Which takes whole levels only."""
    file = io.BytesIO()
    torch.save(inception_weights(), file)
    file.seek(0)
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    levels = ((made_up_pictures()[0] + 1) * 127.5).round()
    (expected,) = network(levels.byte())
    features = build("inception").forward_features(levels / 127.5 - 1)[0].flatten(1)
    # float32 through 94 convolutions: 3e-5 was seen, beside features up to 61.
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-4)


def test_efficientnet_knows_a_cup_of_coffee():
    network = build("efficientnet-lite0").network
    pixel_values = torch.from_numpy(np.array(skimage.data.coffee()[20:380, 120:480])).permute(2, 0, 1)[None] / 127.5 - 1
    features = network(pixel_values)
    assert features.shape == (1, 1280) and not features.requires_grad
    with zipfile.ZipFile(CACHE.expanduser() / WHEEL.file) as file:
        weights = torch.load(file.open(WEIGHTS), map_location="cpu", weights_only=True)
    scores = (features @ weights["_fc.weight"].T + weights["_fc.bias"]).softmax(dim=-1)
    assert scores.argmax().item() == 967  # espresso, among ImageNet's classes
    assert scores.max().item() > 0.5


def test_resizing_by_hand():
    # From 2 pixels to 4: places 0, 0.5, 1 and 1.5, which lies beyond the last pixel.
    line = torch.tensor([[10.0, 20.0]]).reshape(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert resize_like_tensorflow(line, 4)[0, 0].tolist() == [[10, 15, 20, 20]] * 4
    # From 4 to 2: every second pixel, nothing of those between.
    line = torch.tensor([1.0, 9.0, 2.0, 9.0]).expand(1, 1, 4, 4)
    assert resize_like_tensorflow(line, 2)[0, 0].tolist() == [[1, 2], [1, 2]]


def test_inceptions_levels():
    """0 to 255; the official code's are twice that."""
    a = photographs(48)
    right, official = (InceptionFeatures(files() / "inception", input_range=key) for key in ("uint8", "official"))
    expected = right.network(127.5 * (a + 1))
    assert torch.equal(right.forward_features(a)[0].flatten(1), expected)
    assert torch.equal(official.forward_features(a)[0].flatten(1), right.network(255 * (a + 1)))
    b = noise(a, 0.1)
    mean_square = (expected - right.network(127.5 * (b + 1))).square().mean(dim=1)
    torch.testing.assert_close(right(a, b), mean_square)
    with pytest.raises(ValueError, match="must be one of uint8, official, not '0..1'"):
        InceptionFeatures(files() / "inception", input_range="0..1")
