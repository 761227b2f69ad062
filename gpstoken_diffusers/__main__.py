"""`python -m gpstoken_diffusers` is the command `gpstoken`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
