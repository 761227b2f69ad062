"""Trains networks: what the scripts in `examples/train/` share. It uses evaluation and no pipeline."""
