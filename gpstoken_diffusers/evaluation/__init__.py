"""Judges of pictures: how near they are to originals and to real ones. Imports no training."""
