"""Every example workflow on a real server, and what its pictures must show."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from comfyui.make_example_workflows import WORKFLOWS, numbered, workflows
from gpstoken_diffusers.assets import DEMO_PHOTOGRAPH, EXAMPLE_PICTURES

EXAMPLES = workflows()
NAMES = {name.split("_", 1)[1]: name for name in EXAMPLES}


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(np.float64)


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((ours - theirs) ** 2))


@pytest.fixture(scope="module")
def results(comfyui_clone):
    """name -> key of a preview node -> its pictures; each workflow runs once, when it is first asked for."""
    done = {}

    def run(short: str) -> dict[str, list[Image.Image]]:
        if short not in done:
            workflow, numbers = numbered(EXAMPLES[NAMES[short]][1])
            entry = comfyui_clone.run(workflow, timeout=300)
            pictures = comfyui_clone.images(entry)
            done[short] = {key: pictures[number] for key, number in numbers.items() if number in pictures}
        return done[short]

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_files_are_what_the_script_says(name):
    """Node types and widget values of the file are those that ran; only places and sizes are the script's."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    text, described = EXAMPLES[name]
    expected = sorted(one["class_type"] for one in described.values())
    found = {one["id"]: one for one in graph["nodes"]}
    assert sorted(one["type"] for one in found.values() if one["type"] != "MarkdownNote") == expected
    assert [one["widgets_values"] for one in found.values() if one["type"] == "MarkdownNote"] == [[text]]
    for number, one in numbered(described)[0].items():
        constants = [value for value in one["inputs"].values() if not isinstance(value, list)]
        values = list(found[int(number)].get("widgets_values", []))
        for constant in constants:
            assert constant in values, (one["class_type"], constant, values)
    assert Image.open(WORKFLOWS / f"{name}.jpg").size[1] >= 300


def test_reconstruction_is_near_the_photograph(results):
    original = pixels(Image.open(DEMO_PHOTOGRAPH))
    shown = results("reconstruct")
    (picture,), (gaussians,) = shown["picture"], shown["gaussians"]
    assert psnr(pixels(picture), original) > 26.5  # 27.2 when this was written
    assert gaussians.size == picture.size == (768, 512)
    assert psnr(pixels(gaussians), original) < 20  # dimmed, and ellipses over it


def test_a_mask_sharpens_what_it_covers(results):
    original = pixels(Image.open(DEMO_PHOTOGRAPH))
    shown = results("focus_tokens_by_a_mask")
    inside = np.s_[75:205, 200:430]
    with_mask, without = (psnr(pixels(shown[key][0])[inside], original[inside]) for key in ("picture", "without"))
    assert with_mask > without + 1.5  # dB; 2.1 when this was written


def test_generated_pictures_differ_and_are_pictures(results):
    pictures = [pixels(one) for one in results("generate")["picture"]]
    assert len(pictures) == 4 and all(one.shape == (256, 256, 3) for one in pictures)
    for number, one in enumerate(pictures):
        assert one.std() > 8  # a white sheet has less than 2; some emoji are pale
        assert one[:4].mean() > 235  # emoji lie on white
        assert all(psnr(one, other) < 25 for other in pictures[:number])


def test_a_layout_keeps_the_shape_of_its_picture(results):
    """The drawn picture is white where the duck's picture is, and not where the duck is."""
    picture = pixels(results("layout_of_a_picture_texture_of_a_class")["picture"][0])
    duck = np.asarray(Image.open(EXAMPLE_PICTURES["duck"]))[..., 3] > 128
    painted = picture.min(axis=-1) < 215
    assert painted[duck].mean() > painted[~duck].mean() + 0.5


def test_inpainting_leaves_the_far_field_exactly(results):
    shown = results("inpaint")
    picture, before = pixels(shown["picture"][0]), pixels(shown["preview before"][0])
    changed = (picture != before).any(axis=-1)
    assert changed[20:110, 40:216].mean() > 0.5
    assert not changed[200:].any()


def test_merging_takes_each_half_from_its_picture(results):
    merged = pixels(results("merge_two_pictures")["picture"][0])
    originals = {}
    for name, path in EXAMPLE_PICTURES.items():
        picture = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        originals[name] = pixels(Image.alpha_composite(white, picture))
    assert psnr(merged[:90], originals["duck"][:90]) > 24
    assert psnr(merged[150:], originals["honey pot"][150:]) > 24
    assert psnr(merged[150:], originals["duck"][150:]) < 15


def test_an_untouched_layout_changes_nothing(results):
    edited = results("edit_a_layout_by_hand")["picture"][0]
    duck = Image.open(EXAMPLE_PICTURES["duck"])
    white = Image.new("RGBA", duck.size, "white")
    assert psnr(pixels(edited), pixels(Image.alpha_composite(white, duck))) > 26
