"""Tests of the nodes in a real ComfyUI server and its page in a real browser.

A package, unlike `tests` itself, so that the two files called conftest.py are two modules.
"""
