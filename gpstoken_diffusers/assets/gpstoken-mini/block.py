"""Run by ModularPipeline.from_pretrained(<this folder>, trust_remote_code=True)."""

from gpstoken_diffusers.modular import GPSTokenBlocks
