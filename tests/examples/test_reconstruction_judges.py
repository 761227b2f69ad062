"""Which networks judge reconstructions, what they see, and the distances of whole sets of pictures."""

from __future__ import annotations

import numpy as np
import perceptual_zoo
import pytest
import torch
from reconstruction import judges as judging
from reconstruction.judges import FeatureJudge, Judges, SetDistances, load_judges
from reconstruction_zoo import MeanColours, MeanDifference
from scipy.linalg import sqrtm

from gpstoken_diffusers.evaluation import inception
from gpstoken_diffusers.evaluation.distances import paired_kernel_distance


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return drawn(count, 3, 8, 8, seed=seed).float().clamp(-1, 1)


class WithSpatial(MeanColours):
    spatial = "sFID, mean colours"

    def forward(self, images):
        return super().forward(images)[0], images[:, 0, 0, :4] + 1000  # a mean far larger than the deviations


def compare(made: torch.Tensor, real: torch.Tensor, judge=None) -> dict[str, float | None]:
    sets = SetDistances(judge or WithSpatial())
    sets.add(torch.ones(1, 3, 8, 8), real=False)  # left over from a run that failed
    for batch in real.split(7):
        sets.add(batch, real=True)
    sets.forget_made()
    for batch in made.split(5):
        sets.add(batch, real=False)
    return sets.figures()


def test_set_distances_are_their_equations():
    real, made = pictures(40), pictures(40, seed=1) * 0.7 + 0.1
    figures = compare(made, real)
    assert list(figures) == [WithSpatial.frechet, WithSpatial.spatial, WithSpatial.kernel]
    for place, name in enumerate((WithSpatial.frechet, WithSpatial.spatial)):
        a, b = (WithSpatial()(images)[place].double().numpy() for images in (made, real))
        roots = np.trace(sqrtm(np.cov(a.T) @ np.cov(b.T)).real)
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * roots
        # float64; of the spatial features, 6 digits of their squares are the mean's.
        assert figures[name] == pytest.approx(expected, rel=1e-6)
    rows = [WithSpatial()(images)[0] for images in (made, real)]
    assert figures[WithSpatial.kernel] == pytest.approx(1000 * paired_kernel_distance(*rows).value)


def test_identical_sets_have_no_distance_and_few_have_none_to_tell():
    images = pictures(6)
    names = (MeanColours.frechet, MeanColours.kernel)
    figures = compare(images, images, MeanColours())
    assert figures[names[1]] == 0
    # Roots of eigenvalues that rounding moved away from 0; never negative.
    assert 0 <= figures[names[0]] < 1e-6
    assert compare(images[:1], images, MeanColours()) == dict.fromkeys(names)


def test_few_pictures_of_many_features_have_the_right_distance():
    """Covariances of low rank: two sets that are shifted copies differ by their means."""

    class Shifted(MeanColours):
        def forward(self, images):
            return drawn(64, 512)[: len(images)].float() + images[:, :1, 0, 0], None

    real = torch.zeros(22, 3, 4, 4)
    sets = SetDistances(Shifted())
    sets.add(real, real=True)
    sets.add(real + 0.5, real=False)
    # 1e-5 was seen: see above.
    assert sets.figures()[Shifted.frechet] == pytest.approx(512 * 0.25, rel=1e-4)


def test_only_so_many_features_are_kept(monkeypatch):
    monkeypatch.setattr(judging, "KERNEL_PICTURES", 5)
    real, made = pictures(8), pictures(8, seed=1)
    figures, of_five = compare(made, real), compare(made[:5], real[:5])
    assert figures[WithSpatial.kernel] == of_five[WithSpatial.kernel]
    assert figures[WithSpatial.frechet] != of_five[WithSpatial.frechet]


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
    monkeypatch.setattr(judging, "find_inception_file", lambda cache: perceptual_zoo.files() / "inception")
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


def test_networks_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    judges = load_judges("auto", "auto", tmp_path, "cpu")
    assert judges.perceptual is None and judges.features is None
    assert [note.count("fetch_perceptual.py") for note in judges.notes] == [1, 1]
    with pytest.raises(FileNotFoundError, match="fetch_perceptual.py"):
        load_judges("stlpips-vgg", "none", tmp_path, "cpu")
    with pytest.raises(FileNotFoundError, match=inception.FILES[0]):
        load_judges("none", "inception", tmp_path, "cpu")
    assert load_judges("none", "none", tmp_path, "cpu") == Judges()
