"""The README.md that a trained autoencoder is saved with."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import ConfigMixin

_CARD = """---
library_name: diffusers
tags: [gpstoken, image-tokenizer, autoencoder, gaussian-splatting]
---

# {title}

A GPSToken autoencoder (arXiv 2509.01109) of {parameters:.1f} M parameters: {num_tokens} tokens with {texture_channels}
texture channels for each {sample_size} x {sample_size} px, trained by `examples/train/train_autoencoder.py`.

```python
from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor

model = AutoencoderGPSToken.from_pretrained("THIS_FOLDER")
processor = GPSTokenImageProcessor.from_pretrained("THIS_FOLDER")
```

## Data

{pictures} pictures: {places}.{skipped}
Nobody but you knows their licences: say here what may be done with these weights.

## Recipe

{steps} steps of {per_step} crops of {sample_size} px in {minutes:.0f} minutes on {device}, by `{command}`.
The weights are the exponential moving average. All settings:

```json
{settings}
```

## Figures

{figures}
"""


def write_model_card(
    folder: Path,
    model: ConfigMixin,
    settings: dict,
    command: str,
    device: str,
    num_pictures: int,
    num_skipped: int,
    per_step: int,
    steps: int,
    minutes: float,
    last_row: dict[str, float],
) -> None:
    """Writes README.md into the folder of a model.

    Args:
        settings: the command line's arguments by name.
        command: the command line.
        device: what it was trained on.
        num_pictures, num_skipped: pictures in all places, and those that could not be read.
        per_step: crops of a step on all processes.
        steps, minutes: how long the training took.
        last_row: of the run's curve; empty before the first validation.
    """
    names = {"psnr": "PSNR, dB", "ssim": "SSIM", "judge": "perceptual distance"}
    figures = []
    for name, value in last_row.items():
        kind, _, number = name.partition("_")
        if kind in names and (not number or number.isdecimal()):
            place = settings["validation_dir"][int(number or 1) - 1]
            figures.append(f"| {place} | {names[kind]} | {value:.4g} |")
    places = settings["train_dir"] or [settings["dataset_name"]]
    text = _CARD.format(
        title=Path(settings["output_dir"]).resolve().name,
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        pictures=f"{num_pictures:,}",
        places=", ".join(f"`{place}`" for place in places),
        skipped=f" {num_skipped} of them could not be read and were skipped." if num_skipped else "",
        steps=f"{steps:,}",
        per_step=per_step,
        minutes=minutes,
        device=device,
        command=command,
        settings=json.dumps(settings, indent=2, default=str),
        figures="\n".join(["| held-out pictures | figure | value |", "|---|---|---|", *figures])
        if figures
        else "None: it was trained without `--validation_dir`.",
        **{name: model.config[name] for name in ("num_tokens", "texture_channels", "sample_size")},
    )
    (folder / "README.md").write_text(
        text, encoding="utf-8", errors="backslashreplace"
    )  # a folder's name may be no UTF-8
