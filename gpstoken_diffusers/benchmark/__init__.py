"""Ours against a plain twin, stage by stage and end to end: `python -m gpstoken_diffusers.benchmark`."""
