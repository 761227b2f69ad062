"""Memory budgets hold: working memory measured in fresh processes, against the budget and against the estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import RETURNS_MEMORY
from package_process import run_code

from gpstoken_diffusers.ops.backend import native

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc"),
    pytest.mark.skipif(native.library("cpu") is None, reason=native.why_missing("cpu") or "none"),
]

# A model of the official kind, with decoder and attention large enough to be seen beside what Python itself moves.
_MAP_MODEL = """dict(hidden_size=128, num_layers=2, num_attention_heads=4, stem_num_layers=1, texture_channels=8,
    decoder_block_out_channels=(32, 64, 64), decoder_num_layers=1, num_tokens=64, decode_mode="tile")"""
# The kind of gpstoken-mini 2, with narrower networks, so that tokens and painting count.
_PATCH_MODEL = """dict(hidden_size=128, num_layers=2, num_attention_heads=4, stem_channels=64, stem_patch_size=4,
    region_reading="flatten", roi_size=4, min_region_size=4, partition_criterion="error", region_pixels=8,
    decoder_type="patch", map_size=128, decoder_block_out_channels=(16, 64), decoder_num_layers=1, lattice_size=8,
    lattice_channels=8, decode_mode="merge")"""

_SETUP = """
import json, torch
from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.assets import MINI
from harness import peak_memory_mb
torch.set_num_threads(1)
cpu, found = torch.device("cpu"), {}
generator = torch.Generator().manual_seed(0)

def picture(size, dtype):
    coarse = torch.rand(1, 3, size // 8, size // 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").to(dtype)

def working_mb(model, image, mode=None):
    # Less what comes out: that is not working memory.
    def encode():
        (found["tokens"],) = model.encode(image, return_dict=False)
    def decode():
        found["sample"] = model.decode(found["tokens"], mode=mode).sample
    figures = {}
    with torch.inference_mode():
        model(image[..., :256, :256])
        figures["encode"] = peak_memory_mb(encode, cpu) - found["tokens"].num_bytes / 2**20
        figures["decode"] = peak_memory_mb(decode, cpu) - found["sample"].nbytes / 2**20
    found.clear()
    return figures
"""


def in_fresh_process(code: str) -> dict:
    done = run_code(_SETUP + code + "\nprint(json.dumps(result))", **RETURNS_MEMORY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Beside the tensors: what Python and the C library take while they run, in MB.
SLACK_MB = 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_pictures_stay_within_the_budget(dtype):
    """For the shipped model; and a budget is used: estimates that are far too high would be slow.

    Of what is estimated 80 to 90% is taken; whole tiles, and windows of equal size, leave a part of a budget over.
    """
    result = in_fresh_process(f"""
model = AutoencoderGPSToken.from_pretrained(MINI, dtype=torch.{dtype}).eval()
image = picture(768, torch.{dtype})
result = {{}}
for budget in (50, 90):
    model.set_memory_budget(f"{{budget}}MiB")
    result[budget] = working_mb(model, image)
""")
    for budget, used in result.items():
        for way in ("encode", "decode"):
            assert used[way] <= int(budget) + SLACK_MB, (budget, used)
            assert used[way] >= 0.3 * int(budget), (budget, used)


def test_memory_does_not_grow_with_the_picture():
    """More than twice the pixels, windows of the same size: as much memory to work in."""
    result = in_fresh_process("""
model = AutoencoderGPSToken.from_pretrained(MINI, dtype=torch.bfloat16).eval()
model.set_memory_budget("40MiB")
result = {size: working_mb(model, picture(size, torch.bfloat16)) for size in (1024, 1536)}
""")
    for way in ("encode", "decode"):
        assert result["1536"][way] <= result["1024"][way] + 2 * SLACK_MB, result
        assert result["1536"][way] <= 40 + SLACK_MB, result


def test_a_model_of_the_official_kind_stays_within_the_budget():
    result = in_fresh_process(f"""
torch.manual_seed(0)
model = AutoencoderGPSToken(**{_MAP_MODEL}).eval()
image = picture(512, torch.float32)
result = {{}}
for name, mode, budget in (("tile", "tile", 210), ("merge", "merge", 700)):
    model.set_memory_budget(f"{{budget}}MiB")
    result[name] = {{"budget": budget, **working_mb(model, image, mode)}}
""")
    for used in result.values():
        assert used["encode"] <= used["budget"] + SLACK_MB, result
        assert used["decode"] <= used["budget"] + SLACK_MB, result
    assert result["tile"]["encode"] >= 0.3 * 210, result
    assert result["tile"]["decode"] >= 0.2 * 210, result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_small_pictures_stays_within_the_budget(dtype):
    """Also with so many tokens that these take more than the convolutions do."""
    result = in_fresh_process(f"""
torch.manual_seed(0)
model = AutoencoderGPSToken(**{_PATCH_MODEL}).to(torch.{dtype}).eval()
image = picture(768, torch.{dtype})
model.set_memory_budget("60MiB")
result = {{}}
for count in (256, 1024):
    model.register_to_config(num_tokens=count)
    result[count] = working_mb(model, image)
""")
    for used in result.values():
        for way in ("encode", "decode"):
            assert used[way] <= 60 + SLACK_MB, result
    assert min(result["256"].values()) >= 0.3 * 60, result


def test_the_attention_of_a_map_decoder_never_holds_its_weights():
    """They would be sixteen times as many for a tile of twice the size, 1 GB here; maps are four times as large."""
    result = in_fresh_process(f"""
torch.manual_seed(0)
model = AutoencoderGPSToken(**{_MAP_MODEL}).eval()
result = {{}}
with torch.inference_mode():
    tokens = model.encode(picture(256, torch.float32)).tokens
    for size in (256, 512):
        decode = lambda: model.decode(tokens, size=(size, size))
        decode()
        result[size] = [peak_memory_mb(decode, cpu), model.work_plan.map_bytes(1, (size // 4, size // 4)) / 2**20]
""")
    for used, estimate in result.values():
        assert 0.5 * estimate <= used <= estimate, result
    assert result["512"][0] <= 4.5 * result["256"][0], result


def test_windows_with_ever_other_numbers_of_tokens_leave_nothing_behind():
    """oneDNN keeps what it compiled for each number of rows: a hundred of them were 110 MB."""
    result = in_fresh_process("""
from gpstoken_diffusers.models.windows import Window
decoder = AutoencoderGPSToken.from_pretrained(MINI, dtype=torch.bfloat16).decoder.eval()
geometry = torch.rand(5000, 5, generator=generator) * 2 - 1
geometry[:, :3] = torch.tensor([0.01, 0.01, 0.0])
texture = torch.randn(5000, 32, generator=generator).bfloat16()
def paint(count):
    decoder.unfold_texture.paint_window(geometry[:count], texture[:count], (256, 256), Window(0, 0, 64, 64))
with torch.inference_mode():
    for count in (3000, 4000, 5000):
        paint(count)
    result = peak_memory_mb(lambda: [paint(count) for count in range(3000, 5000, 20)], cpu)
    one = peak_memory_mb(lambda: paint(5000), cpu)
result = [result, one]
""")
    assert result[0] <= result[1] + 20, result
