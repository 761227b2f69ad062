"""Tells diffusers where the class of this component is. The package itself lies elsewhere."""

if __name__ == "gpstoken_diffusers":
    raise ImportError("This file hides the package gpstoken_diffusers: start Python in another folder.")
try:
    import gpstoken_diffusers
except ImportError as error:
    message = f"This model needs the package gpstoken_diffusers ({error}): pip install -U gpstoken-diffusers"
    raise ImportError(message) from error


def __getattr__(name):
    return getattr(gpstoken_diffusers, name)
