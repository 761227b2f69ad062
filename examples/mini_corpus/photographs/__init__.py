"""Photographs in Debian packages: where they lie, how to read them, under which licences they are."""
