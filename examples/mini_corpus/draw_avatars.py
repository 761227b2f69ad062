"""Draw labelled avatars of 256 px in fifteen styles, as many as are wanted, with whole combinations of parts held out.

    python examples/mini_corpus/draw_avatars.py --output data/avatars

installs DiceBear and resvg from the npm registry into --cache (Node 18 or newer; `npm ci` checks their checksums),
draws 1,500 avatars of each style to train on and 150 held out, and writes OUTPUT/train/STYLE/NUMBER.png and
OUTPUT/heldout/STYLE/NUMBER.png, OUTPUT/labels.jsonl, OUTPUT/README.md (styles, designers, licences, counts) and
OUTPUT/LICENSES. A second run draws only what is missing, and --count may grow. 25,000 pictures take some ten minutes.

What is on an avatar depends on its style, split and number alone. Each line of labels.jsonl says it: file, style, parts
(name -> variant, or null where there is none) and colours (name -> "#rrggbb"). For each style two parts are told apart
in PAIRS: one in ten of their combinations is in held-out pictures only, so that a generator which draws one has not
copied it.

Exit code: 0 all pictures are there, 1 an error (it says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

from fetching import sha256_of, write_atomically
from tqdm import tqdm

REGISTRY = "https://registry.npmjs.org"
TOOLS = Path(__file__).parent / "avatars"
SIZE = 256
HELDOUT_SHARE = 0.1

# Style -> the two parts whose combinations are held out.
PAIRS = {
    "lorelei": ("hair", "eyes"),
    "notionists": ("hair", "lips"),
    "open-peeps": ("head", "face"),
    "pixel-art": ("hair", "mouth"),
    "thumbs": ("eyes", "mouth"),
    "adventurer": ("hair", "eyes"),
    "big-ears": ("hair", "eyes"),
    "big-smile": ("hair", "eyes"),
    "croodles": ("top", "eyes"),
    "dylan": ("hair", "mood"),
    "fun-emoji": ("eyes", "mouth"),
    "micah": ("hair", "mouth"),
    "miniavs": ("hair", "eyes"),
    "personas": ("hair", "mouth"),
    "toon-head": ("eyes", "mouth"),
}
LICENCES = {"CC0 1.0", "CC BY 4.0"}
BACKGROUNDS = ("ffffff", "b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf", "c7ecd0", "f4efc1")
# Colours for styles that are black and white by default.
COLOURS = {
    "lorelei": {
        "hairColor": ("000000", "562306", "ab2a18", "e5d7a3", "afafaf", "592454"),
        "skinColor": ("ffffff", "f2d3b1", "ecad80", "9e5622"),
    },
}
# A colour that others should differ from, where they can.
SKIN = ("skinColor", "baseColor", "shapeColor")
# Chosen by the style itself: black or white, whichever is seen.
CONTRASTING = {"thumbs": ("eyesColor", "mouthColor")}
# Parts that are rare by default would hardly be learned.
LEAST_PROBABILITY = 20


def draw_number(*key: str | int) -> int:
    """A large number that depends on the key alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big")


def choose(values: list | tuple, *key: str | int):
    return values[draw_number(*key) % len(values)]


@functools.cache
def heldout_combinations(style: str, firsts: tuple[str, ...], seconds: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """Those combinations of the variants of the style's PAIRS that are held out, one in ten."""
    order = sorted(itertools.product(firsts, seconds), key=lambda pair: draw_number("combination", style, *pair))
    return frozenset(order[: max(1, round(HELDOUT_SHARE * len(order)))])


def choose_options(style: str, schema: dict, split: str, number: int) -> dict:
    """DiceBear's options for one avatar, every part and colour of the style in them.

    Args:
        style, split, number: all that the choice depends on.
        schema: the style's options, as its JSON schema has them.
    """
    key = (style, split, number)
    options: dict = {"seed": "/".join(map(str, key)), "size": SIZE}
    colours = {"backgroundColor": {"default": BACKGROUNDS}, **{k: v for k, v in schema.items() if k.endswith("Color")}}
    for name, rule in schema.items():
        if name.endswith("Probability"):
            part, least = name.removesuffix("Probability"), max(rule["default"], LEAST_PROBABILITY)
            options[name] = 100 if draw_number(*key, part, "is there") % 100 < least else 0
        elif "enum" in rule.get("items", {}):
            options[name] = [choose(rule["items"]["enum"], *key, name)]
        elif name not in colours and rule.get("type") == "array":  # a range, such as of a rotation
            low, high = min(rule["default"]), max(rule["default"])
            options[name] = [low + draw_number(*key, name) % (high - low + 1)]
    variants = {name: tuple(schema[name]["items"]["enum"]) for name in PAIRS[style]}
    held = heldout_combinations(style, *variants.values())
    attempt = 0
    while (tuple(options[name][0] for name in variants) in held) != (split == "heldout"):
        attempt += 1
        options |= {name: [choose(values, *key, name, attempt)] for name, values in variants.items()}
    options |= {f"{name}Probability": 100 for name in variants if f"{name}Probability" in options}

    taken: set[str] = set()
    for name in sorted(colours, key=lambda name: (name == "backgroundColor", name not in SKIN)):
        if name in CONTRASTING.get(style, ()):
            continue
        palette = COLOURS.get(style, {}).get(name, colours[name]["default"])
        avoided = taken if name == "backgroundColor" else taken & {options[skin][0] for skin in SKIN if skin in options}
        options[name] = [choose([colour for colour in palette if colour not in avoided] or palette, *key, name)]
        taken.add(options[name][0])
    return options


def install(cache: Path, registry: str) -> Path:
    """Folder with DiceBear, resvg and draw.mjs in it, filled unless it is there.

    Raises OSError: no Node, one that is too old, or the registry refuses.
    """
    folder = cache / f"avatars-{sha256_of(TOOLS / 'package-lock.json')[:12]}"
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise OSError("node and npm were not found. Install Node.js 18 or newer (Debian: apt install nodejs npm)")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < 18:
        raise OSError(f"Node.js 18 or newer is needed, this is {version.strip()}")
    for file in ("package.json", "package-lock.json", "draw.mjs"):
        write_atomically(folder / file, (TOOLS / file).read_bytes())
    if not (folder / "installed").exists():
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--registry", registry]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"npm could not install the packages: {last}. Give another registry by --registry")
        write_atomically(folder / "installed", b"")
    return folder


def read_styles(tools: Path) -> dict[str, dict]:
    """Style -> its options (a JSON schema) and meta (designer, source, licence)."""
    command = ["node", "draw.mjs", "styles", *PAIRS]
    done = subprocess.run(command, cwd=tools, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise OSError(f"the drawing packages do not start: {done.stderr.strip()}")
    styles = json.loads(done.stdout)
    for name, style in styles.items():
        if (licence := style["meta"]["license"]["name"]) not in LICENCES:
            raise ValueError(f"style {name} has the licence {licence}, expected one of {', '.join(sorted(LICENCES))}")
    return styles


def label(style: str, file: str, options: dict, drawn: dict) -> dict:
    """The line of labels.jsonl; `drawn` is what DiceBear says it drew: a style may leave out a part that is hidden."""
    parts = {name: drawn.get(name) for name, value in sorted(options.items()) if isinstance(value, list)
             and not name.endswith("Color") and isinstance(value[0], str)}  # fmt: skip
    colours = {name: value for name, value in sorted(drawn.items()) if name.endswith("Color")}
    background = colours.pop("primaryBackgroundColor")
    colours.pop("secondaryBackgroundColor")
    return {"file": file, "style": style, "parts": parts, "colours": colours | {"backgroundColor": background}}


def read_labels(output: Path) -> dict[str, dict]:
    """File -> its line of labels.jsonl, of pictures that are there."""
    path = output / "labels.jsonl"
    rows = map(json.loads, path.read_text("utf-8").splitlines()) if path.exists() else ()
    return {row["file"]: row for row in rows if (output / row["file"]).exists()}


def draw_pictures(
    output: Path, tools: Path, styles: dict[str, dict], counts: dict[str, int], labels: dict[str, dict]
) -> None:
    """Draws those pictures that have no label yet, and adds their labels."""
    node = subprocess.Popen(
        ["node", "draw.mjs", "draw"], cwd=tools, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    jobs = [(split, style, number) for split in counts for style in styles for number in range(counts[split])]
    try:
        for split, style, number in tqdm(jobs, unit="picture"):
            file = f"{split}/{style}/{number:05}.png"
            if file in labels:
                continue
            options = choose_options(style, styles[style]["options"], split, number)
            job = {"style": style, "options": options, "file": str((output / file).resolve())}
            node.stdin.write(json.dumps(job) + "\n")
            node.stdin.flush()
            answer = node.stdout.readline()
            if not answer:
                raise OSError(f"node stopped at {file}; its message is above. Run again to go on")
            labels[file] = label(style, file, options, json.loads(answer))
    finally:
        node.stdin.close()
        node.wait()


README = """# Avatars in {number} styles

{table}

Drawn by the npm packages @dicebear/core and @dicebear/collection 9.4.3 (code: MIT) with @resvg/resvg-js 2.6.2
(MPL-2.0), {size} px. Designs: as the table says; licence texts are in LICENSES. What was changed: parts and colours
were chosen by number, backgrounds come from a palette of our own. labels.jsonl says what is on each picture. Written by
examples/mini_corpus/draw_avatars.py of gpstoken_diffusers.
"""


def draw(output: Path, cache: Path, registry: str, names: list[str], counts: dict[str, int]) -> None:
    """Draws what is missing and writes labels, licences and README.

    Raises OSError, ValueError: with a message for the user.
    """
    tools = install(cache, registry)
    styles = {name: style for name, style in read_styles(tools).items() if name in names}
    labels = read_labels(output)
    try:
        draw_pictures(output, tools, styles, counts, labels)
    finally:  # also after Ctrl-C: what was drawn is on record
        lines = "".join(json.dumps(labels[file]) + "\n" for file in sorted(labels))
        write_atomically(output / "labels.jsonl", lines.encode("utf-8"))
    for name in styles:
        text = (tools / "node_modules/@dicebear" / name / "LICENSE").read_bytes()
        write_atomically(output / "LICENSES" / f"{name}.LICENSE.txt", text)
    table = ["| style | designer | licence | source | train | heldout |", "|---|---|---|---|---|---|"]
    for name, style in styles.items():
        meta = style["meta"]
        cells = name, meta["creator"], meta["license"]["name"], meta["source"], counts["train"], counts["heldout"]
        table.append(f"| {' | '.join(map(str, cells))} |")
    text = README.format(number=len(styles), table="\n".join(table), size=SIZE)
    write_atomically(output / "README.md", text.encode("utf-8"))
    print("\n".join(table))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for train/, heldout/, labels.jsonl, README.md, LICENSES/")
    add("--count", type=int, default=1500, help="avatars of each style to train on; a tenth as many more are held out")
    add("--styles", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="STYLE", help="default: all fifteen")
    add("--cache", type=Path, default=Path("~/.cache/gpstoken"), help="folder for the npm packages (%(default)s)")
    add("--registry", default=REGISTRY, help="an npm registry, or a mirror of it (%(default)s)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count must be at least 1, got {options.count}")
    counts = {"train": options.count, "heldout": -(-options.count // 10)}
    try:
        draw(options.output, options.cache.expanduser(), options.registry, options.styles, counts)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
