"""Trains networks: what the scripts in `examples/train/` share. It uses evaluation and no pipeline."""

import os

# How often a thread of GNU's OpenMP looks whether the others are done before it lets others have its core. By default
# it looks for seconds, and beside a busy neighbour a step of two threads then takes up to half a minute. Read once,
# when torch is imported: the scripts import this module before it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
