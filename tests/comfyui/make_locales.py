#!/usr/bin/env python
"""Writes locales/en/nodeDefs.json and node_list.json anew from the nodes' schemas; says what other languages lack.

    python tests/comfyui/make_locales.py

ComfyUI serves locales/<language>/ to its page, from the root of a folder in custom_nodes. Translations are written by
hand; the tests compare their keys with the English ones. ComfyUI-Manager reads node_list.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))

from comfyui.comfyui_server import ComfyUIServer  # noqa: E402
from comfyui.fetch_comfyui import ensure_server  # noqa: E402

LOCALES = TESTS.parent / "locales"
LANGUAGES = ["en", "zh"]
OUR_MODULES = ("custom_nodes.gpstoken_diffusers", "custom_nodes.gpstoken_diffusers_nodes")


def our_nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    """What a server says of our nodes alone."""
    return {name: found for name, found in object_info.items() if found["python_module"] in OUR_MODULES}


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """What nodeDefs.json must hold in English for what a server says of our nodes."""
    return {name: _definition(found) for name, found in our_nodes(object_info).items()}


def descriptions(definitions: dict[str, Any]) -> dict[str, str]:
    """What node_list.json must hold: each node, and what it is for."""
    return {name: found["description"] for name, found in definitions.items()}


def _definition(found: dict[str, Any]) -> dict[str, Any]:
    inputs = {}
    for name, (_, options) in (found["input"].get("required", {}) | found["input"].get("optional", {})).items():
        inputs[name] = _named(options.get("display_name") or name, options.get("tooltip"))
        if options.get("control_after_generate"):  # a widget that the page adds
            inputs["control_after_generate"] = _named("control after generate", None)
    outputs = zip(found["output_name"], found["output_tooltips"], strict=True)
    described = {"display_name": found["display_name"], "description": found["description"], "inputs": inputs}
    if found["output"]:
        described["outputs"] = {str(place): _named(*output) for place, output in enumerate(outputs)}
    return described


def _named(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def paths(tree: dict[str, Any], above: str = "") -> dict[str, str]:
    """Every text of a locale, by the keys that lead to it: {"GPSEncode.inputs.image.name": "image"}."""
    found = {}
    for key, value in tree.items():
        found |= paths(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


def read(language: str, name: str) -> dict[str, Any]:
    """A file of a language."""
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def main() -> None:
    with ComfyUIServer(ensure_server(), "clone") as server:
        definitions = english(server.object_info())
    text = json.dumps(definitions, indent=2, ensure_ascii=False) + "\n"
    (LOCALES / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")
    text = json.dumps(descriptions(definitions), indent=2, ensure_ascii=False) + "\n"
    (LOCALES.parent / "node_list.json").write_text(text, encoding="utf-8")
    for language in LANGUAGES:
        for path in sorted(paths(definitions).keys() ^ paths(read(language, "nodeDefs.json")).keys()):
            print(f"{language}: missing, or of no node any more: {path}")


if __name__ == "__main__":
    main()
