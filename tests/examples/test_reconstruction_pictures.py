"""Which pictures are measured on, and which are left out."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from reconstruction.squares import Squares
from reconstruction_zoo import write_pictures


def test_which_pictures_are_taken(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50), (40, 90), (39, 90), (64, 64)])
    squares = Squares(folder, 40)
    assert squares.names == ["0.png", "1.png", "3.png"]
    assert squares.left_out == 1
    assert Squares(folder, 40, at_least=60).names == ["3.png"]
    write_pictures(folder / "a", [(40, 40)] * 9)
    assert Squares(folder / "a", 32, most=3).names == ["0.png", "3.png", "6.png"]  # evenly spread
    assert len(Squares(folder / "a", 32, most=100)) == 9
    assert Squares(folder, 40).names[-1] == "a/8.png"


def test_squares_come_in_batches_and_in_order(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50)] * 5)
    batches = list(Squares(folder, 32).batches(2))
    assert [places for places, _ in batches] == [[0, 1], [2, 3], [4]]
    whole = torch.cat([images for _, images in batches])
    assert torch.equal(whole, next(Squares(folder, 32).batches(5))[1])
    assert whole.shape == (5, 3, 32, 32) and whole.abs().max() <= 1


def test_pictures_lie_as_their_camera_says(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture = Image.new("RGB", (40, 40), "black")
    picture.paste("white", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.save(tmp_path / "pictures" / "turned.png", exif=exif)
    _, images = next(Squares(tmp_path / "pictures", 40).batches(1))
    assert images[0, :, 0].max() == -1 and images[0, :, -1].min() == 1


def test_damaged_pictures_are_skipped_and_named(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(70, 50)] * 4)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])  # its header is right
    (folder / "2.png").write_bytes(b"nothing")
    squares = Squares(folder, 32)
    assert [places for places, _ in squares.batches(8)] == [[0, 2]]  # places among those that could be opened
    assert sorted(squares.damaged) == [str(folder / "1.png"), str(folder / "2.png")]
    for name in ("0.png", "3.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="none of 1 pictures can be read"):
        list(Squares(folder, 32).batches(1))


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
