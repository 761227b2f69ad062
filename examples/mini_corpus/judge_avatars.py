"""Are the parts of generated avatars right? Classifiers of parts, trained on drawn avatars, say how sure they are.

    python examples/mini_corpus/judge_avatars.py --data data/avatars --pictures samples=runs/evaluation/samples

--data is the folder of draw_avatars.py, each folder of --pictures has a folder per style in it. For the two parts of a
style whose combinations are held out (hair and eyes, for most), the table says

  - valid: how many pictures have two parts of which the classifiers are sure. The limit is where they are surer of 95
    of 100 drawn avatars that they did not see: two pairs of eyes, or hair half this and half that, are below it;
  - new: how many of the valid ones show a combination that no training picture has.

"right" is how often each classifier names the part of a drawn avatar that it did not see.
Features are maps of EfficientNet-Lite0 (pip install timm; it is fetched where it is missing), averaged to 16 x 16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from draw_avatars import PAIRS, read_labels
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gpstoken_diffusers.evaluation.efficientnet import WHEEL, EfficientNetLite0, read_efficientnet
from gpstoken_diffusers.evaluation.weight_files import CACHE
from gpstoken_diffusers.training.data import center_crop, to_pixel_values

MAP = 1
"""Of the network's maps: 24 channels at a quarter of the picture's size."""
CELLS = 16
RIDGE = 0.1
"""Of the mean square of the features, added to the diagonal of the kernel."""
SURE = 0.05
"""Share of drawn avatars that are less sure than the limit."""


class PartClassifier:
    """Ridge regression, one output per variant, on centred features; its certainty is the lead of the first variant.

    Args:
        features: (n, D) of training pictures.
        variants: what each of them shows.
    """

    def __init__(self, features: Tensor, variants: list[str | None]):
        self.names = sorted(set(variants), key=str)
        targets = F.one_hot(torch.tensor([self.names.index(name) for name in variants]), len(self.names)).float()
        self.mean, self.share = features.mean(0), targets.mean(0)
        centred = features - self.mean
        kernel = centred @ centred.T
        kernel.diagonal().add_(RIDGE * kernel.diagonal().mean())
        self.weight = centred.T @ torch.linalg.solve(kernel, targets - self.share)

    def __call__(self, features: Tensor) -> tuple[list[str | None], Tensor]:
        """(m, D) -> the variants shown, and how sure that is, (m,): how far the first output is before the second."""
        scores = (features - self.mean) @ self.weight + self.share
        best = scores.topk(2, dim=1).values
        return [self.names[index] for index in scores.argmax(1).tolist()], best[:, 0] - best[:, 1]


@torch.no_grad()
def describe(network: EfficientNetLite0, paths: list[Path]) -> Tensor:
    """Features (n, D) of pictures."""
    features = []
    for start in tqdm(range(0, len(paths), 32), desc=str(paths[0].parent), leave=False):
        pictures = [center_crop(Image.open(path).convert("RGB"), 256) for path in paths[start : start + 32]]
        maps = network.maps(torch.stack([to_pixel_values(picture) for picture in pictures]))[MAP]
        features.append(F.adaptive_avg_pool2d(maps, CELLS).flatten(1))
    return torch.cat(features)


def judge_style(
    network: EfficientNetLite0, data: Path, style: str, labels: dict[str, dict], folders: dict[str, Path]
) -> dict[str, tuple[float, float]]:
    """Name of a set -> the shares of valid pictures and of new ones among these; "right" -> of the two parts."""
    parts = PAIRS[style]
    rows = {
        split: [row for file, row in labels.items() if file.startswith(f"{split}/{style}/")]
        for split in ("train", "heldout")
    }
    shown = {split: [tuple(row["parts"][part] for part in parts) for row in some] for split, some in rows.items()}
    drawn = {split: describe(network, [data / row["file"] for row in some]) for split, some in rows.items()}
    judges = [PartClassifier(drawn["train"], list(variants)) for variants in zip(*shown["train"], strict=True)]

    def judged(features: Tensor) -> tuple[list[tuple], Tensor]:
        variants, certainty = zip(*(judge(features) for judge in judges), strict=True)
        return list(zip(*variants, strict=True)), torch.stack(certainty)

    found, certainty = judged(drawn["heldout"])
    limits = certainty.quantile(SURE, dim=1, keepdim=True)
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(found, shown["heldout"], strict=True)]
    results = {"right": tuple(sum(a == b for a, b in part) / len(part) for part in zip(*pairs, strict=True))}
    known = set(shown["train"])
    for name, features in [
        ("held-out", drawn["heldout"]),
        *((name, describe(network, sorted((folder / style).glob("*.png")))) for name, folder in folders.items()),
    ]:
        found, certainty = judged(features)
        valid = (certainty >= limits).all(0)
        new = torch.tensor([pair not in known for pair in found])
        results[name] = (valid.float().mean().item(), new[valid].float().mean().item())
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Folder of draw_avatars.py.")
    add("--pictures", nargs="*", default=[], metavar="NAME=FOLDER", help="Folders of pictures, a folder per style.")
    add("--cache", type=Path, default=CACHE, help="Folder of the network (%(default)s).")
    args = parser.parse_args(argv)
    folders = {}
    for text in args.pictures:
        name, _, folder = text.partition("=")
        if not folder or not Path(folder).is_dir():
            parser.error(f"--pictures takes NAME=FOLDER, folders that exist, got {text}")
        folders[name] = Path(folder)
    labels = read_labels(args.data)
    if not labels:
        parser.error(f"{args.data} has no labels.jsonl with pictures beside it; draw_avatars.py makes it")
    WHEEL.fetch(args.cache)
    network = read_efficientnet(args.cache)
    names = ["held-out", *folders]
    print("| style | parts | right, held-out |", " | ".join(f"{name}: valid | new" for name in names), "|")
    print("|---" * (3 + 2 * len(names)) + "|")
    rows = []
    for style in sorted({row["style"] for row in labels.values()}):
        results = judge_style(network, args.data, style, labels, folders)
        figures = [*results.pop("right"), *(figure for pair in results.values() for figure in pair)]
        rows.append(figures)
        print_row(style, ", ".join(PAIRS[style]), figures)
    print_row("mean", "", torch.tensor(rows).mean(0).tolist())


def print_row(style: str, parts: str, figures: list[float]) -> None:
    first, second, *others = (f"{figure:.2f}" for figure in figures)
    print(f"| {style} | {parts} | {first}, {second} |", " | ".join(others), "|", flush=True)


if __name__ == "__main__":
    main()
