"""Run by DiffusionPipeline.from_pretrained(<this folder>, trust_remote_code=True)."""

try:
    from gpstoken_diffusers import GPSTokenPipeline
except ImportError as error:
    message = f"This model needs the package gpstoken_diffusers ({error}): pip install -U gpstoken-diffusers"
    raise ImportError(message) from error
