"""Licences of photographs: read from what their packages say, and shipped with the demo photograph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from photographs.licences import Licence, debian_licence, kde_licence, readme_licence
from PIL import Image

ROOT = Path(__file__).parents[2]

DEBIAN_COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: Main Author
License: GPL-3+

Files: land/*
Copyright: Various
License: public-domain
 Donated by
 .
 their makers.

Files: land/*-harro*
Copyright: 2017, Harro
           2018, Harro's friend
License: CC-BY-SA-4.0
Comment: Cropped.

Files:
 land/hill1*
 land/hill2*
Copyright: Somebody
License: CC0-1.0

License: GPL-3+
 The text of it.
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sound.wav", Licence("GPL-3+", "Main Author")),
        ("land/sea.jpg", Licence("public-domain", "Various", "Donated by . their makers.")),
        ("land/hill1.jpg", Licence("CC0-1.0", "Somebody")),
        # land/hill1* stands later, but the pattern that names the author is the one that is meant.
        ("land/hill17-harro.jpg", Licence("CC-BY-SA-4.0", "2017, Harro; 2018, Harro's friend", "Cropped.")),
    ],
)
def test_debian_licence(path, expected):
    assert debian_licence(DEBIAN_COPYRIGHT, path) == expected


def test_debian_licence_missing():
    with pytest.raises(ValueError, match="no paragraph for other.jpg"):
        debian_licence("Files: land/*\nCopyright: A\nLicense: B\n", "other.jpg")


README = """\
Copyright: Ada: the first
License: CC0-1.0
Source: https://example.org/File:Bee.jpg
Files:
bee.webp
wasp.webp

Files: far/heron.webp
License: Public Domain
Copyright: Bo

Copyright: Cy
License: CC-BY-SA 4.0
swan_0.webp
swan.webp
Comment: based on a photo by Di
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("wasp.webp", Licence("CC0-1.0", "Ada: the first", None, "https://example.org/File:Bee.jpg")),
        ("far/heron.webp", Licence("Public Domain", "Bo")),
        ("swan.webp", Licence("CC-BY-SA 4.0", "Cy", "based on a photo by Di")),
    ],
)
def test_readme_licence(path, expected):
    assert readme_licence(README, path) == expected


def test_readme_licence_missing():
    with pytest.raises(ValueError, match="no paragraph for heron.webp"):
        readme_licence(README, "heron.webp")


def test_kde_licence():
    metadata = {"KPlugin": {"License": "LGPLv3", "Authors": [{"Name": "Ada", "Name[de]": "A"}, {"Name": "Bo"}]}}
    assert kde_licence(json.dumps(metadata)) == Licence("LGPLv3", "Ada, Bo")


def test_demo_photograph_ships_with_its_licence():
    assets = ROOT / "gpstoken_diffusers" / "assets"
    with Image.open(assets / "demo.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (768, 512))
    assert (assets / "demo.jpg").stat().st_size < 200_000
    assert "CC0 1.0" in (assets / "DEMO_LICENSE.txt").read_text("utf-8")
