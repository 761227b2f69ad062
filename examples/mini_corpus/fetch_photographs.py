"""Fetch real photographs with free licences, for training and for held-out evaluation.

    python examples/mini_corpus/fetch_photographs.py --output data/photographs

downloads Debian packages (430 MB, kept in --cache), checks their sha256, unpacks them without installing them
and writes OUTPUT/train/*, OUTPUT/heldout/* and the manifest OUTPUT/photographs.json: per photograph its
package and version, path in the package, sha256, width, height (px), licence and author as the package states
them. JPEG and PNG files are copied byte by byte, others become PNG. A second run writes only what is missing.
Files that this script did not write are never touched. The held-out half is for evaluation only.

Exit code: 0 all photographs are there, 1 something was skipped (it says what and why), 130 interrupted.
"""

import argparse
import hashlib
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fetching import sha256_of, write_atomically
from photographs.debian import PackageUnavailable, fetch_package, unpack_package
from photographs.selection import Photograph, select_photographs
from photographs.sources import SOURCES, Source
from PIL import Image
from tqdm import tqdm

FORMAT = "gpstoken-photographs"
VERSION = 1
# Measured here: strangers reach 0.71, copies cut by 2% at each side 0.87, copies in another size 0.99.
DUPLICATE_SIMILARITY = 0.85


Record = dict[str, str | int]
"""What the manifest says of a photograph."""


def read_manifest(path: Path) -> list[Record]:
    """The photographs of earlier runs.

    Raises:
        ValueError: the file is something else; it is left alone.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] == FORMAT and content["version"] == VERSION:
            return content["photographs"]
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} is no manifest of this script's version; move it away first")


def write_manifest(path: Path, records: list[Record]) -> None:
    """Write the file, whole or not at all."""
    photographs = sorted(records, key=lambda record: record["file"])
    content = {"format": FORMAT, "version": VERSION, "photographs": photographs}
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def encode(data: bytes) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, bytes to store and (width, height) in px of an image file; JPEG and PNG stay as they are."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format in ("JPEG", "PNG"):
            return (".jpg" if image.format == "JPEG" else ".png"), data, image.size
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return ".png", buffer.getvalue(), image.size


def store(source: Source, photograph: Photograph, output: Path, before: list[Record]) -> Record:
    """Write one photograph, unless it is there, and return its record.

    Raises:
        FileExistsError: another file has that name; it is left alone.
    """
    identity = {"package": source.package, "package_version": source.version, "member": photograph.member}
    for record in before:
        if identity.items() <= record.items() and (output / record["file"]).is_file():
            if sha256_of(output / record["file"]) == record["sha256"]:
                return record
    suffix, data, (width, height) = encode(photograph.read())
    path = output / source.split / f"{photograph.name}{suffix}"
    digest = hashlib.sha256(data).hexdigest()
    if not path.exists():
        write_atomically(path, data)
    elif sha256_of(path) != digest:
        raise FileExistsError(f"{path} exists with other content; move it away and run again")
    file = {"file": f"{source.split}/{path.name}", **identity, "sha256": digest, "width": width, "height": height}
    return file | {key: value for key, value in vars(photograph.licence).items() if value is not None}


def fetch_source(source: Source, cache: Path, output: Path, before: list[Record]) -> Iterator[Record]:
    """Fetch, check and unpack one package and store its photographs.

    Raises:
        PackageUnavailable, FileExistsError, ValueError: with a message for the user.
    """
    print(f"{source.package} {source.version}")
    deb = fetch_package(source, cache)
    with tempfile.TemporaryDirectory(prefix="gpstoken-photographs-") as folder:
        unpack_package(deb, Path(folder))
        for photograph in tqdm(list(select_photographs(source, Path(folder))), desc=source.package, unit="photo"):
            yield store(source, photograph, output, before)


def fetch(sources: tuple[Source, ...], cache: Path, output: Path) -> int:
    """Fetch all packages and write the manifest; returns how many packages were skipped."""
    skipped, manifest = 0, output / "photographs.json"
    records = {record["file"]: record for record in read_manifest(manifest)}
    try:
        for source in sources:
            before = [record for record in records.values() if record["package"] == source.package]
            try:
                for record in fetch_source(source, cache, output, before):
                    records[record["file"]] = record
                    before = [other for other in before if other["file"] != record["file"]]
            except (PackageUnavailable, FileExistsError, ValueError) as error:
                skipped += 1
                print(f"skipped: {error}", file=sys.stderr)
            else:
                for record in before:  # of another selection
                    del records[record["file"]]
    finally:  # also after Ctrl-C: what was written is on record
        write_manifest(manifest, list(records.values()))
    return skipped


def fingerprint(path: Path) -> np.ndarray:
    """Unit vector (544,) of the brightness steps between the cells of a 17 x 17 thumbnail.

    Steps, not brightness: bright sky above dark ground makes strangers look alike.
    """
    with Image.open(path) as image:
        image.draft("L", (256, 256))  # JPEG decodes small pictures faster
        cells = np.asarray(image.convert("L").resize((17, 17), Image.Resampling.BOX), dtype=np.float32)
    steps = np.concatenate([np.diff(cells, axis=0).ravel(), np.diff(cells, axis=1).ravel()])
    return steps / (np.linalg.norm(steps) + 1e-6)


def similar_pairs(folder: Path, files: list[str]) -> list[tuple[float, str, str]]:
    """(similarity up to 1, training file, held-out file) of every such pair, most alike first."""
    prints = {file: fingerprint(folder / file) for file in tqdm(files, desc="comparing", unit="photo")}
    train = [file for file in files if file.startswith("train/")]
    heldout = [file for file in files if file.startswith("heldout/")]
    pairs = [(float(prints[a] @ prints[b]), a, b) for a in train for b in heldout]
    return sorted(pairs, reverse=True)


def report(output: Path) -> None:
    """Print counts, licences, pictures in both halves, and files that are not on record."""
    records = [record for record in read_manifest(output / "photographs.json") if (output / record["file"]).is_file()]
    files = [record["file"] for record in records]
    for split in ("train", "heldout"):
        chosen = [record for record in records if record["file"].startswith(f"{split}/")]
        print(f"{split}: {len(chosen)} photographs")
        for package, count in Counter(record["package"] for record in chosen).most_common():
            print(f"  {count:4} {package}")
        for licence, count in Counter(r["licence"].lower().replace(" ", "-") for r in chosen).most_common():
            print(f"  {count:4} under {licence}")
        present = {f"{split}/{path.name}" for path in (output / split).glob("[!.]*")}
        if strangers := sorted(present - set(files)):
            print(f"  {len(strangers)} files that are not on record, left alone: {', '.join(strangers[:5])}")
    pairs = similar_pairs(output, sorted(files))
    copies = [pair for pair in pairs if pair[0] >= DUPLICATE_SIMILARITY]
    print(f"pictures both in train and heldout (similarity >= {DUPLICATE_SIMILARITY}): {len(copies)}")
    for similarity, a, b in copies or pairs[:1]:
        print(f"  {'' if copies else 'most alike: '}{similarity:.2f} {a} {b}")


def main(arguments: list[str] | None = None, sources: tuple[Source, ...] = SOURCES) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for train/, heldout/ and photographs.json")
    add("--cache", type=Path, default=Path("~/.cache/gpstoken"), help="folder of .deb files (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        skipped = fetch(sources, options.cache.expanduser(), options.output)
        report(options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    if skipped:
        print(f"{skipped} of {len(sources)} packages were skipped, see above", file=sys.stderr)
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
