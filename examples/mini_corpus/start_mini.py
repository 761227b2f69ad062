"""Makes the model that the training of gpstoken-mini 2 starts from.

    python examples/mini_corpus/start_mini.py --train_dir data/photographs/train data/avatars/train --output runs/start

Texture begins as the principal components of regions, as pictures of 8 x 8 px, and decoding as painting these; then
these linear layers are trained alone, for a minute. Stem and refinement transformer have the weights of another model
where they fit. So the first step of the training that follows already reconstructs.
"""

from __future__ import annotations

import argparse

import torch

from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImageProcessor
from gpstoken_diffusers.assets import MINI
from gpstoken_diffusers.training.data import TrainingCrops
from gpstoken_diffusers.training.linear_start import linear_start, principal_start
from gpstoken_diffusers.training.recipes import MODELS

TOKEN_COUNTS = (64, 256, 1024)
CROP = 128
TOKEN_RANGE = (4, 256)
"""Of crops of 128 px: as dense as 16 to 1,024 in 256 px."""
CHANGES = {
    "min_region_size": 4,
    "partition_criterion": "error",
    "region_pixels": 8,
    "decoder_type": "patch",
    # Measured at equal seconds: convolutions on cells of 2 px, wide and few, beat those on cells of 4 px.
    "map_size": 128,
    "decoder_block_out_channels": (32, 128),
    "decoder_num_layers": 2,
    "lattice_size": 8,
    "lattice_channels": 8,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_dir", nargs="+", required=True, help="Folders of images that the components are fitted to.")
    add("--encoder", default=MINI, help="Model whose stem and refiner are taken over.")
    add("--output", required=True)
    add("--crops", type=int, default=400, help="For the principal components.")
    add("--linear_crops", type=int, default=3000)
    add("--linear_steps", type=int, default=1200)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = AutoencoderGPSToken(**MODELS["mini"] | CHANGES)
    old = AutoencoderGPSToken.from_pretrained(args.encoder).float().state_dict()
    own = model.state_dict()
    taken = {n: w for n, w in old.items() if n.split(".")[0] != "decoder" and n in own and own[n].shape == w.shape}
    model.load_state_dict(taken, strict=False)
    crops = TrainingCrops(args.train_dir, model.config.sample_size, 1, args.crops, seed=1)
    images = torch.stack([crops[index]["pixel_values"] for index in range(args.crops)])
    principal_start(model, images, TOKEN_COUNTS)
    small = TrainingCrops(args.train_dir, CROP, 1, args.linear_crops, seed=2)
    crops = torch.stack([small[index]["pixel_values"] for index in range(args.linear_crops)])
    linear_start(model, crops, TOKEN_RANGE, args.linear_steps)
    model.save_pretrained(args.output)
    GPSTokenImageProcessor.for_autoencoder(model.config).save_pretrained(args.output)


if __name__ == "__main__":
    main()
