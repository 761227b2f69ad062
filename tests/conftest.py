"""What all tests share: one thread each, groups for several workers, attention as it was."""

from __future__ import annotations

import pytest
import torch

# Two threads that share a busy machine's cores with something else wait for each other most of the time.
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Several workers share files, as the tests of a file share fixtures. All of ComfyUI's tests share its servers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "comfyui" if "/comfyui/" in file else file

    return ByFile(config, log)


@pytest.fixture
def keep_attention_backend():
    """diffusers' set_attention_backend changes the default of the whole process; this puts it back.

    Left in place it changes the last bits of every model in the tests that follow.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    name, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(name)
