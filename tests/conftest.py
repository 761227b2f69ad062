"""What all tests share: one thread each, groups for several workers, attention as it was."""

from __future__ import annotations

import pytest
import torch

# Two threads that share a busy machine's cores with something else wait for each other most of the time.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Groups for pytest-xdist: tests of one file share its fixtures, and all of ComfyUI's one server.

    ComfyUI's is the longest group; with two workers it runs beside all the rest.
    """
    for item in items:
        group = "comfyui" if "comfyui" in item.path.parts[-2:-1] else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def keep_attention_backend():
    """diffusers' set_attention_backend changes the default of the whole process; this puts it back.

    Left in place it changes the last bits of every model in the tests that follow.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    name, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(name)
