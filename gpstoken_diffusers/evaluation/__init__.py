"""Judges pictures: how near they are to their originals and to real ones. Imports no training."""
