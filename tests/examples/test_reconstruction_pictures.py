"""Which pictures are measured on, and which are left out."""

from __future__ import annotations

import pytest
import torch
from reconstruction_zoo import write_pictures  # first: it makes the examples importable

# isort: split
from PIL import Image
from reconstruction_pictures import Squares


def test_pictures_below_the_resolution_are_left_out_and_counted(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50), (40, 90), (39, 90), (64, 64)])
    squares = Squares(folder, 40)
    assert [path.name for path in squares.paths] == ["0.png", "1.png", "3.png"]
    assert squares.left_out == 1
    assert [path.name for path in Squares(folder, 40, at_least=60).paths] == ["3.png"]


def test_squares_come_in_batches_and_in_order(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50)] * 5)
    batches = list(Squares(folder, 32).batches(2))
    assert [places for places, _ in batches] == [[0, 1], [2, 3], [4]]
    assert [tuple(images.shape) for _, images in batches] == [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 32)]
    whole = torch.cat([images for _, images in batches])
    assert torch.equal(whole, next(Squares(folder, 32).batches(5))[1])
    assert whole.abs().max() <= 1


def test_the_most_are_spread_evenly(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(40, 40)] * 9)
    assert [path.name for path in Squares(folder, 32, most=3).paths] == ["0.png", "3.png", "6.png"]
    assert len(Squares(folder, 32, most=100)) == 9


def test_damaged_pictures_are_skipped_and_named(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50)] * 4)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])  # its header is right
    (folder / "2.png").write_bytes(b"nothing")
    squares = Squares(folder, 32)
    assert [places for places, _ in squares.batches(8)] == [[0, 2]]
    assert sorted(squares.damaged) == [str(folder / "1.png"), str(folder / "2.png")]


def test_pictures_lie_as_their_camera_says(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture = Image.new("RGB", (40, 40), "black")
    picture.paste("white", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.save(tmp_path / "pictures" / "turned.png", exif=exif)
    _, images = next(Squares(tmp_path / "pictures", 40).batches(1))
    assert images[0, :, 0].max() == -1 and images[0, :, -1].min() == 1


def test_folders_without_fitting_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        Squares(tmp_path / "nowhere", 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        Squares(tmp_path / "empty", 32)
    folder = write_pictures(tmp_path / "pictures", [(70, 50)])
    with pytest.raises(ValueError, match="no picture of at least 51 px: the largest has a shorter side of 50 px"):
        Squares(folder, 51)
    (folder / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the files can be read"):
        Squares(folder, 32)


def test_only_damaged_pictures_are_an_error(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50)])
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not one of 1 pictures can be read"):
        list(Squares(folder, 32).batches(1))


def test_names_tell_pictures_of_several_folders_apart(tmp_path):
    for name in ("a", "b"):
        write_pictures(tmp_path / "pictures" / name, [(40, 40)])
    assert Squares(tmp_path / "pictures", 32).names == ["a/0.png", "b/0.png"]
