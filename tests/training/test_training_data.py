"""Training pictures: where they come from, how they are cut, and what happens to those that cannot be read."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import odd_picture
from PIL import Image
from torch.utils.data import DataLoader
from training_runs import make_photographs

from gpstoken_diffusers.ops.partition import partition_image
from gpstoken_diffusers.training import data
from gpstoken_diffusers.training.data import TrainingCrops, center_crop, collate_crops, to_pixel_values
from gpstoken_diffusers.training.pictures import (
    DatasetPictures,
    FolderPictures,
    TarPictures,
    list_images,
    open_pictures,
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("photographs") / "x")


def make_shards(folder: Path, photographs: Path) -> Path:
    """The photographs in two shards as WebDataset writes them, with the JSON file that goes beside each."""
    folder.mkdir()
    paths = list_images(photographs)
    for number, part in enumerate((paths[:3], paths[3:])):
        with tarfile.open(folder / f"shard-{number:05}.tar", "w") as archive:
            for path in part:
                archive.add(path, f"{path.stem}.png")
                note = tarfile.TarInfo(f"{path.stem}.json")
                note.size = 2
                archive.addfile(note, io.BytesIO(b"{}"))
    return folder


def as_arrays(pictures) -> list[np.ndarray]:
    return [np.asarray(pictures.load(index)) for index in range(len(pictures))]


def test_linked_folders_are_followed_once(photographs, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for link, place in (("linked", photographs), ("again", photographs), ("back", folder)):
        (folder / link).symlink_to(place, target_is_directory=True)
    assert list_images(folder) == [folder / "again" / path.name for path in list_images(photographs)]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no image"):
        list_images(tmp_path)


def test_shards_hold_what_the_folder_holds(photographs, tmp_path):
    folder = make_shards(tmp_path / "shards", photographs)
    expected = as_arrays(FolderPictures(photographs))
    for place in (folder, f"{folder}/*.tar", f"{folder}/shard-{{00000..00001}}.tar"):
        pictures = open_pictures(place)
        assert isinstance(pictures, TarPictures)
        assert all(np.array_equal(*pair) for pair in zip(as_arrays(pictures), expected, strict=True))
        assert pictures.name(3).endswith("shard-00001.tar:3.png")


def test_a_dataset_holds_what_the_folder_holds(photographs, tmp_path):
    datasets = pytest.importorskip("datasets")
    expected = as_arrays(FolderPictures(photographs))
    paths = [str(path) for path in list_images(photographs)]
    rows = datasets.Dataset.from_dict({"picture": paths, "number": list(range(len(paths)))})
    rows.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "saved")
    pictures = DatasetPictures(str(tmp_path / "saved"), column="picture")
    assert all(np.array_equal(*pair) for pair in zip(as_arrays(pictures), expected, strict=True))
    with pytest.raises(ValueError, match="no column 'image'; it has picture, number"):
        DatasetPictures(str(tmp_path / "saved"))


def test_bad_shards_are_named(photographs, tmp_path):
    folder = make_shards(tmp_path / "shards", photographs)
    shard = folder / "shard-00000.tar"
    with pytest.raises(ValueError, match="No tar shard matches"):
        open_pictures(tmp_path / "absent-*.tar")
    with tarfile.open(folder / "shard-00002.tar", "w:gz") as archive:
        archive.add(shard, "inner.png")
    with pytest.raises(ValueError, match="shard-00002.tar: not an uncompressed tar"):
        open_pictures(folder)
    empty = tmp_path / "empty.tar"
    tarfile.open(empty, "w").close()
    with pytest.raises(ValueError, match="No image"):
        TarPictures([empty])


def test_pictures_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert FolderPictures(tmp_path).load(0).size == (20, 40)


def test_transparent_pictures_lie_on_white(tmp_path):
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "glass.png")
    assert FolderPictures(tmp_path).load(0).getpixel((0, 0)) == (255, 255, 255)


def test_a_sample_is_a_crop_with_its_partition(photographs):
    sample = TrainingCrops(photographs, 32, 6, length=8, seed=3)[0]
    pixels = sample["pixel_values"]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and pixels.abs().max() <= 1
    regions, geometry = partition_image(pixels[None], 6)
    assert torch.equal(sample["regions"], regions[0]) and torch.equal(sample["geometry"], geometry[0])
    assert sample["skipped"] == []


def test_samples_do_not_depend_on_who_asks(photographs):
    first, second = (TrainingCrops(photographs, 32, 6, length=8, seed=3) for _ in range(2))
    second[1]
    for name in ("pixel_values", "regions", "geometry"):
        assert torch.equal(first[5][name], second[5][name]), name
    assert not torch.equal(first[5]["pixel_values"], first[6]["pixel_values"])
    loaded = DataLoader(second, 2, num_workers=2, collate_fn=collate_crops)
    for number, batch in enumerate(loaded):
        for place in range(2):
            assert torch.equal(batch["pixel_values"][place], first[2 * number + place]["pixel_values"])


def test_pictures_smaller_than_the_crop_are_enlarged(tmp_path):
    """Of many sizes: exp(log(size)) rounds to more than the size for some of them."""
    for side in range(30, 46):
        Image.new("RGB", (side, side + 3)).save(tmp_path / f"{side}.png")
    crops = TrainingCrops(tmp_path, 48, 1, length=64)
    assert all(crops[index]["pixel_values"].shape == (3, 48, 48) for index in range(64))


def test_every_pass_shows_each_picture_once(tmp_path):
    for shade in range(5):
        Image.new("RGB", (32, 32), (10 * shade,) * 3).save(tmp_path / f"{shade}.png")
    crops = TrainingCrops(tmp_path, 32, 1, length=15)
    shades = [round((crops[index]["pixel_values"].mean().item() + 1) * 12.75) for index in range(15)]
    assert [sorted(shades[start : start + 5]) for start in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert shades[:5] != shades[5:10] or shades[5:10] != shades[10:]


def test_folders_are_drawn_from_equally_often(tmp_path):
    for name, color, count in (("few", "black", 1), ("many", "white", 9)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (32, 32), color).save(tmp_path / name / f"{number}.png")
    crops = TrainingCrops([tmp_path / "few", tmp_path / "many"], 32, 1, length=400)
    white = sum(crops[index]["pixel_values"].mean() > 0 for index in range(400)) / 400
    assert abs(white - 0.5) < 0.1  # four standard deviations
    alone = TrainingCrops(tmp_path / "few", 32, 1, length=4)
    assert all(alone[index]["pixel_values"].max() == -1 for index in range(4))


def test_center_crops_are_the_official_ones(photographs):
    """Centre squares, half of them mirrored."""
    crops = TrainingCrops(photographs, 32, 1, length=40, crop="center")
    pictures = FolderPictures(photographs)
    squares = torch.stack([to_pixel_values(center_crop(pictures.load(index), 32)) for index in range(4)])
    samples = torch.stack([crops[index]["pixel_values"] for index in range(40)])[:, None]
    plain, mirrored = ((samples == choices).flatten(2).all(dim=2).any(dim=1) for choices in (squares, squares.flip(-1)))
    assert (plain ^ mirrored).all()
    assert 8 <= mirrored.sum() <= 32  # four standard deviations about 20


def test_token_counts_vary_from_batch_to_batch_within_bounds(photographs):
    crops = TrainingCrops(photographs, 64, 16, length=120, token_jitter=0.5, batch_size=4)
    counts = [len(crops[index]["regions"]) for index in range(120)]
    for start in range(0, 120, 4):
        assert len(set(counts[start : start + 4])) == 1
    assert min(counts) >= 8 and max(counts) <= 24 and len(set(counts)) > 8


def test_token_counts_are_drawn_log_uniformly(photographs):
    crops = TrainingCrops(photographs, 64, 16, length=400, token_range=(2, 32), batch_size=2)
    counts = np.array([crops._tokens_of_batch(batch) for batch in range(200)])
    assert len(crops[0]["regions"]) == len(crops[1]["regions"]) == counts[0]
    assert counts.min() >= 2 and counts.max() <= 32
    # As many from 2 to 8 as from 8 to 32; uniform ones would be 0.2. Of 200 draws: 4 standard deviations are 0.14.
    assert (counts < 8).mean() == pytest.approx(0.5, abs=0.15)


def test_the_partition_follows_its_settings(photographs):
    settings = {"criterion": "error", "min_region_size": 4}
    sample = TrainingCrops(photographs, 64, 40, length=1, partition=settings)[0]
    expected = partition_image(sample["pixel_values"][None], 40, **settings)
    assert torch.equal(sample["regions"], expected.regions[0])
    assert not torch.equal(sample["regions"], partition_image(sample["pixel_values"][None], 40).regions[0])


def test_unreadable_pictures_are_replaced_and_named(photographs, tmp_path, caplog):
    for path in list_images(photographs):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"no picture at all")
    # A pickle with code in it is no picture either.
    (tmp_path / "code.png").write_bytes(b"cos\nsystem\n(S'touch /tmp/gpstoken_was_here'\ntR.")
    odd_picture(tmp_path / "odd.dds")
    crops = TrainingCrops(tmp_path, 32, 1, length=16)
    samples = [crops[index] for index in range(16)]
    skipped = {Path(name).name for sample in samples for name in sample["skipped"]}
    assert skipped == {"cut.png", "empty.png", "text.jpg", "code.png", "odd.dds"}
    assert all(sample["pixel_values"].isfinite().all() for sample in samples)
    batch = collate_crops(samples)
    assert len(batch["skipped"]) == sum(len(sample["skipped"]) for sample in samples)
    assert batch["pixel_values"].shape == (16, 3, 32, 32)
    assert "cut.png cannot be read and is skipped" in caplog.text
    assert not Path("/tmp/gpstoken_was_here").exists()


def test_a_folder_of_nothing_readable_is_an_error(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"nothing")
    with pytest.raises(OSError, match="100 pictures in a row"):
        TrainingCrops(tmp_path, 32, 1, length=4)[0]


def test_decoded_pictures_are_kept_within_bounds(photographs, monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 3 * 80 * 60)
    crops = TrainingCrops(photographs, 32, 1, length=8, seed=1)
    free = [crops[index]["pixel_values"] for index in range(8)]
    assert len(crops._decoded) == 2
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    bare = TrainingCrops(photographs, 32, 1, length=8, seed=1)
    assert all(torch.equal(bare[index]["pixel_values"], free[index]) for index in range(8))


@pytest.mark.parametrize(
    "settings",
    [{"crop": "left"}, {"token_jitter": 1.0}, {"token_jitter": -0.1}, {"token_range": (0, 8)}, {"token_range": (9, 8)}],
)
def test_bad_settings(photographs, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrainingCrops(photographs, 32, 1, length=1, **settings)


def test_pictures_open_without_the_datasets_package():
    """It is optional: reading folders and shards must not import it."""
    code = "import sys; import gpstoken_diffusers.training.pictures; print('datasets' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
