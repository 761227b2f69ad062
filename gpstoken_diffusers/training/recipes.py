"""Settings that belong together: sizes of models, and ways to train them."""

from __future__ import annotations

from ..models.official_checkpoints import PRESETS

# The shipped small model. Everything in it is local but the refinement transformer.
MINI = {
    "num_tokens": 256,
    "texture_channels": 32,
    "stem_channels": 128,
    "stem_patch_size": 4,
    "stem_num_layers": 2,
    "roi_size": 4,
    "region_reading": "flatten",
    "hidden_size": 256,
    "num_layers": 6,
    "num_attention_heads": 4,
    "decoder_type": "lattice",
    "decoder_block_out_channels": (64, 192),
    "decoder_num_layers": 6,
    "lattice_size": 4,
    "lattice_channels": 32,
    "decode_mode": "merge",
}

MODELS = {"mini": MINI, **PRESETS}
"""Arguments of `AutoencoderGPSToken` by name: ours, and the three released sizes."""

# Of "official" and "paper" alike.
_RELEASED = {
    "crop": "center",
    "token_jitter": 0.0,
    "max_train_steps": 1_000_000,
    "optimizer": "adam",
    "learning_rate": 5e-5,
    "adam_betas": (0.5, 0.9),
    "weight_decay": 0.0,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "ema_decay": 0.9999,
    "mixed_precision": "no",
    "l1_weight": 0.0,
    "l2_weight": 1.0,
    "perceptual_network": "lpips-vgg",
    "perceptual_weight": 1.0,
    "adversarial_weight": 0.3,
    "critic_start": 600_000,
    "critic_learning_rate": 5e-5,
}

RECIPES = {
    # Exact pixels, the best PSNR; blurs what it cannot know.
    "pixels": {},
    # Sharper pictures: what a perceptual network sees counts, later what a critic thinks. Customary weights, not tuned.
    "sharp": {
        "perceptual_weight": 0.2,
        "adversarial_weight": 0.1,
        "critic_start": 2000,
    },
    # What the official training script and its published configuration for L256 do, mistakes included. Left: its
    # average of the weights takes every tenth step.
    "official": {
        **_RELEASED,
        "batch_size": 16,
        # The code feeds 0..510 into a network made for 0..255.
        "feature_network": "inception-official",
        "feature_weight": 1.0,
        "critic_schedule": "alternating",
        "critic_norm": "batch",
    },
    # What the paper's text says; where it says nothing, as the official code. examples/README.md has the differences.
    "paper": {
        **_RELEASED,
        "batch_size": 96,
        "perceptual_start": 600_000,
    },
}
"""Defaults of the command line that a recipe changes."""

PAPER_MODEL = {"support": 5.0, "min_region_size": 4}
"""Arguments of `AutoencoderGPSToken` that the paper's text states otherwise than the released configurations."""

PAPER_S64 = {"num_layers": 60}
"""The same of S64 alone."""
