"""Distances between sets of pictures against closed forms and plain sums; which networks judge, and what they see."""

from __future__ import annotations

import math

import numpy as np
import perceptual_zoo
import pytest
import torch
from reconstruction_zoo import MeanColours, MeanDifference  # first: it makes the examples importable

# isort: split
import reconstruction_judges
from reconstruction_judges import FeatureJudge, FeatureSet, Judges, load_judges

from gpstoken_diffusers.evaluation import perceptual_files
from gpstoken_diffusers.evaluation.distances import (
    FeatureGaussian,
    FeatureMoments,
    frechet_distance,
    kernel_distance,
    paired_kernel_distance,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int = 3) -> torch.Tensor:
    return torch.linalg.qr(drawn(size, size, seed=seed)).Q


# Frechet distance


def test_frechet_distance_of_diagonal_covariances_is_their_closed_form():
    mean_a, mean_b = drawn(7), drawn(7, seed=1)
    deviation_a, deviation_b = drawn(7, seed=2).abs(), drawn(7, seed=4).abs()
    a = FeatureGaussian.from_covariance(mean_a, deviation_a.square().diag())
    b = FeatureGaussian.from_covariance(mean_b, deviation_b.square().diag())
    expected = (mean_a - mean_b).square().sum() + (deviation_a - deviation_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_distance_of_rotated_covariances():
    """A rotation of both changes nothing; of one only, two dimensions have a closed form."""
    values_a, values_b, turn = drawn(7).square(), drawn(7, seed=1).square(), rotation(7)
    mean = torch.zeros(7)
    a = FeatureGaussian.from_covariance(mean, turn @ values_a.diag() @ turn.T)
    b = FeatureGaussian.from_covariance(mean, turn @ values_b.diag() @ turn.T)
    expected = (values_a.sqrt() - values_b.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)

    # tr (C_a C_b)^(1/2) = sqrt(tr(C_a C_b) + 2 sqrt(det(C_a C_b))) for 2 x 2.
    angle = 0.7
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    c_a, c_b = torch.tensor([4.0, 0.5]).double().diag(), turn @ torch.tensor([2.0, 1.0]).double().diag() @ turn.T
    both = c_a @ c_b
    expected = c_a.trace() + c_b.trace() - 2 * (both.trace() + 2 * both.det().sqrt()).sqrt()
    gaussians = [FeatureGaussian.from_covariance(torch.zeros(2), c) for c in (c_a, c_b)]
    assert frechet_distance(*gaussians) == pytest.approx(expected.item(), rel=1e-12)


def test_moments_of_batches_are_those_of_the_whole():
    features = (drawn(50, 6) @ drawn(6, 6, seed=1) + 1000).float()  # means far larger than deviations
    moments = FeatureMoments()
    for batch in features.split(7):
        moments.add(batch)
    gaussian = moments.gaussian()
    assert moments.count == 50
    torch.testing.assert_close(gaussian.mean, features.double().mean(0), rtol=1e-12, atol=0)
    covariance = torch.from_numpy(np.cov(features.double().numpy(), rowvar=False))
    torch.testing.assert_close(gaussian.root @ gaussian.root.T, covariance, rtol=1e-9, atol=1e-9)


def test_few_pictures_have_covariances_of_low_rank():
    features = drawn(5, 40)
    moments, other = FeatureMoments(), FeatureMoments()
    moments.add(features)
    other.add(features + 2)
    assert moments.gaussian().root.shape == (40, 4)
    assert frechet_distance(moments.gaussian(), moments.gaussian()) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(moments.gaussian(), other.gaussian()) == pytest.approx(4 * 40, rel=1e-10)


def test_samples_of_known_gaussians_come_near_their_distance():
    a, b = FeatureMoments(), FeatureMoments()
    a.add(drawn(20000, 3))
    b.add(2 * drawn(20000, 3, seed=1) + 1)
    assert frechet_distance(a.gaussian(), b.gaussian()) == pytest.approx(3 + 3, rel=0.03)


def test_impossible_moments_are_refused():
    moments = FeatureMoments()
    moments.add(drawn(1, 4))
    with pytest.raises(ValueError, match="at least 2 rows"):
        moments.gaussian()
    with pytest.raises(ValueError, match="features of 4 numbers came before, now of 5"):
        moments.add(drawn(2, 5))
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments.add(torch.full((1, 4), math.nan))
    with pytest.raises(ValueError, match="shape"):
        moments.add(drawn(4))
    with pytest.raises(TypeError, match="floating point"):
        moments.add(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"a mean \(d,\) and a covariance \(d, d\)"):
        FeatureGaussian.from_covariance(torch.zeros(3), torch.eye(2))
    gaussians = [FeatureGaussian.from_covariance(torch.zeros(d), torch.eye(d)) for d in (2, 3)]
    with pytest.raises(ValueError, match="2 and 3 numbers"):
        frechet_distance(*gaussians)


# Kernel distance of pairs


def test_paired_kernel_distance_leaves_out_the_pairs():
    a, b = drawn(6, 4), drawn(6, 4, seed=1)

    def by_definition(rows: list[int]) -> float:
        total = 0.0
        for i in rows:
            for j in rows:
                if i != j:
                    pairs = ((a[i], a[j]), (b[i], b[j]), (a[i], b[j]), (a[j], b[i]))
                    kernels = [(x @ y / 4 + 1) ** 3 for x, y in pairs]
                    total += (kernels[0] + kernels[1] - kernels[2] - kernels[3]).item()
        return total / (len(rows) * (len(rows) - 1))

    distance = paired_kernel_distance(a, b)
    assert distance.value == pytest.approx(by_definition(list(range(6))))
    without = np.array([by_definition([i for i in range(6) if i != left_out]) for left_out in range(6)])
    assert distance.standard_error == pytest.approx(np.sqrt(5 / 6 * ((without - without.mean()) ** 2).sum()))


def test_a_set_is_at_no_distance_from_itself():
    features = drawn(8, 4)
    assert paired_kernel_distance(features, features).value == 0
    assert kernel_distance(features, features).value < 0  # what pairs do to the other estimate
    with pytest.raises(ValueError, match="sets of one size, not 8 and 7"):
        paired_kernel_distance(features, features[:7])


# Networks


def test_identical_sets_have_no_distance():
    judges = Judges(features=MeanColours())
    images = drawn(6, 3, 8, 8).float().clamp(-1, 1)
    sets = [FeatureSet(), FeatureSet()]
    for some in sets:
        for batch in images.split(4):
            some.add(*judges.features(batch))
    assert judges.set_distances(*sets) == {
        MeanColours.frechet: pytest.approx(0, abs=1e-12),
        MeanColours.kernel: 0,
    }
    few = FeatureSet()
    few.add(*judges.features(images[:1]))
    assert judges.set_distances(few, few) == {MeanColours.frechet: None, MeanColours.kernel: None}


def test_only_so_many_features_are_kept(monkeypatch):
    monkeypatch.setattr(reconstruction_judges, "KERNEL_PICTURES", 5)
    kept = FeatureSet()
    for _ in range(4):
        kept.add(drawn(2, 3), None)
    assert (len(torch.cat(kept.first)), kept.moments.count) == (5, 8)


def test_large_pictures_go_through_the_perceptual_network_one_by_one():
    seen = []

    class Watching(MeanDifference):
        def forward(self, a, b):
            seen.append(len(a))
            return super().forward(a, b)

    judges = Judges(perceptual=Watching())
    a, b = torch.zeros(3, 3, 512, 600), torch.ones(3, 3, 512, 600)
    assert judges.perceptual_distances(a, b).tolist() == [1, 1, 1]
    assert seen == [1, 1, 1]
    judges.perceptual_distances(a[..., :64, :64], b[..., :64, :64])
    assert seen[3:] == [3]


def test_inception_gives_spatial_features_too(monkeypatch):
    path = perceptual_zoo.files() / perceptual_files.INCEPTION_FILES[0]
    weights = perceptual_zoo.inception_weights()
    monkeypatch.setattr(reconstruction_judges, "find_inception_file", lambda cache: path)
    monkeypatch.setattr(reconstruction_judges, "read_weights_file", lambda file: weights)
    judge = FeatureJudge("inception")
    assert (judge.frechet, judge.spatial, judge.kernel) == ("rFID", "sFID", "KID x 1000")
    images = perceptual_zoo.photographs(64)
    features, spatial = judge(images)
    assert features.shape == (2, 2048)
    assert spatial.shape == (2, 7 * 17 * 17)
    levels = ((images + 1) * 127.5).round()
    torch.testing.assert_close(features, judge.network(levels))
    # The network sees pictures as they would be saved.
    assert torch.equal(judge((images + 0.001).clamp(-1, 1))[0], judge(((levels / 127.5 - 1) + 0.001).clamp(-1, 1))[0])
    assert spatial.min() >= 0 and spatial.std() > 0


def test_networks_that_are_not_here_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(perceptual_files.importlib.util, "find_spec", lambda name: None)
    judges = load_judges("auto", "auto", tmp_path, "cpu")
    assert judges.perceptual is None and judges.features is None
    assert len(judges.notes) == 2
    assert "fetch_perceptual.py" in judges.notes[0]
    assert "feature_network.py" in judges.notes[1] or "timm" in judges.notes[1]
    with pytest.raises(FileNotFoundError, match="fetch_perceptual.py"):
        load_judges("stlpips-vgg", "none", tmp_path, "cpu")
    with pytest.raises(FileNotFoundError, match="torch-fidelity"):
        load_judges("none", "inception", tmp_path, "cpu")
    assert load_judges("none", "none", tmp_path, "cpu") == Judges()
