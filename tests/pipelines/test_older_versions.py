"""What earlier versions saved, documented and published still works: folders, imports, workflows."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

import gpstoken_diffusers
from gpstoken_diffusers.assets import MINI, MINI_PIPELINE

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
# As version 0.1.0 documented them, wherever the modules lie now.
DOCUMENTED = {
    "assets": "DEMO_PHOTOGRAPH MINI MINI_PIPELINE",
    "token_editing": "delete_tokens duplicate_tokens merge_tokens move_tokens rotate_tokens select_by_mask",
    "token_files": "encoded_size",
    "token_matching": "interpolate_tokens match_tokens swap_texture",
    "tokens": "GPSTokens",
}
NODE_IDS = (
    "GPSDecode GPSEditTokens GPSEncode GPSExampleImage GPSInterpolate GPSLayoutEditor GPSLayoutFromBoxes "
    "GPSLayoutFromImage GPSLayoutFromMask GPSLayoutGenerate GPSMergeTokens GPSSwapTexture GPSTextureGenerate "
    "GPSVisualize LoadGPSToken LoadGPSTokens SaveGPSTokens"
)


def documented_imports() -> list[str]:
    """Import lines of the pages, those in brackets joined."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), MINI_PIPELINE / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"^from (gpstoken_diffusers[.\w]*) import (\([^)]*\)|[^\n#]*)", text, re.MULTILINE)
    return sorted({f"{module} {name}" for module, names in found for name in re.findall(r"\w+", names)})


@pytest.mark.parametrize("line", [
    *documented_imports(),
    *(f"gpstoken_diffusers.{module} {name}" for module, names in DOCUMENTED.items() for name in names.split()),
])  # fmt: skip
def test_documented_imports(line):
    module, name = line.split()
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("name", ["GPSTokenPipeline", "GPSTokenImg2ImgPipeline", "GPSTokenInpaintPipeline"])
def test_the_shipped_folder_loads_as_it_is(name):
    """It was written before the modules moved: it names the package, and no module in it."""
    pipe = getattr(gpstoken_diffusers, name).from_pretrained(MINI_PIPELINE)
    index = json.loads((MINI_PIPELINE / "model_index.json").read_text(encoding="utf-8"))
    for part, entry in index.items():
        if isinstance(entry, list) and not part.startswith("_"):
            assert type(getattr(pipe, part)).__name__ == entry[1]
    assert pipe.id2label == {int(number): name for number, name in index["id2label"].items()}


def test_the_shipped_tokenizer_loads_alone():
    assert gpstoken_diffusers.AutoencoderGPSToken.from_pretrained(MINI).config.texture_channels > 0
    assert gpstoken_diffusers.GPSTokenImageProcessor.from_pretrained(MINI).num_tokens > 0


def published_nodes() -> set[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "comfyui_nodes").glob("*.py"))
    return set(re.findall(r'node_id="(\w+)"', text))


def test_nodes_keep_their_ids():
    assert published_nodes() >= set(NODE_IDS.split())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_nodes_of_example_workflows_are_there(path):
    types = {node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    ours = {name for name in types if "GPS" in name}
    assert ours and ours <= published_nodes()
