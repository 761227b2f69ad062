"""Both ways of installing, on real servers: the same nodes, nobody else's packages touched, clear words if it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from comfyui.comfyui_client import PromptRefused
from comfyui.comfyui_server import ComfyUIServer
from comfyui.make_example_workflows import numbered, workflows
from gpstoken_diffusers.cli.comfyui import FOLDER, VERSION_FILE

ROOT = Path(__file__).resolve().parents[2]
RECONSTRUCT = numbered(workflows()["1_reconstruct"][1])[0]
# What the nodes need and ComfyUI does not bring.
OURS = {"accelerate", "cmake", "diffusers", "gpstoken_diffusers", "gpstoken-diffusers", "ninja"}


def ours(server) -> dict[str, dict]:
    """Our nodes' descriptions, without the folder that they come from and the files that other tests have saved."""
    described = {name: info for name, info in server.object_info().items() if "gpstoken" in info["python_module"]}
    described["LoadGPSTokens"]["input"]["required"]["file"][1]["options"] = []
    return {name: {**info, "python_module": None} for name, info in described.items()}


def test_both_ways_serve_the_same_nodes(comfyui_clone, comfyui_pip):
    clone, pip = ours(comfyui_clone), ours(comfyui_pip)
    assert clone == pip and len(clone) >= 16
    assert all(info["description"] and info["category"].startswith("GPSToken") for info in clone.values())
    for name, info in clone.items():
        for kind in ("required", "optional"):
            for key, (_, options) in info["input"].get(kind, {}).items():
                assert options.get("tooltip") or key in ("tokens", "edits"), (name, key)


@pytest.mark.parametrize("way", ["comfyui_clone", "comfyui_pip"])
def test_no_other_package_changes(way, request):
    server = request.getfixturevalue(way)
    assert server.packages_before.items() <= server.packages_after.items()
    new = {name.lower() for name in server.packages_after} - {name.lower() for name in server.packages_before}
    needed_by_those = {"importlib_metadata", "importlib-metadata", "zipp", "httpx", "psutil"}
    assert new <= OURS | needed_by_those, new


def test_the_pip_way_runs(comfyui_pip):
    pictures = comfyui_pip.images(comfyui_pip.run(RECONSTRUCT, timeout=300))
    assert {picture.size for shown in pictures.values() for picture in shown} == {(768, 512)}


def test_the_clone_built_its_native_library(comfyui_clone):
    built = list((Path(comfyui_clone.node_folder) / "gpstoken_diffusers" / "lib").glob("*gpstoken_cpu*"))
    assert built, "install.py should have built it: this machine has a compiler"


def test_another_version_of_the_package(comfyui_pip):
    version = Path(comfyui_pip.base) / "custom_nodes" / FOLDER / VERSION_FILE
    before = version.read_text()
    version.write_text("9.0.0\n")
    try:
        with pytest.raises(PromptRefused) as caught:
            comfyui_pip.queue(RECONSTRUCT)
    finally:
        version.write_text(before)
    assert re.search(r"belong to gpstoken_diffusers 9.0.0, but version [\d.]+ is installed", str(caught.value))
    assert f'-m gpstoken_diffusers comfyui install "{comfyui_pip.base}' in str(caught.value)
    comfyui_pip.run(RECONSTRUCT, timeout=300)


def test_without_the_package_the_nodes_say_what_to_run(server_install):
    files = {f"{FOLDER}/{path.name}": path.read_text() for path in (ROOT / "comfyui_nodes").glob("*.py")}
    with ComfyUIServer(server_install, None, nodes=files | {f"{FOLDER}/{VERSION_FILE}": "0.1.0\n"}) as server:
        assert len(ours(server)) >= 16
        with pytest.raises(PromptRefused) as caught:
            server.queue(RECONSTRUCT)
        assert "need the package" in str(caught.value)
        assert "-m pip install -U gpstoken_diffusers" in str(caught.value)
        errors = caught.value.node_errors
        assert [found["class_type"] for found in errors.values() if found["errors"]][0] in (
            "LoadGPSToken",
            "GPSExampleImage",
        )


def test_requirements_leave_torch_alone():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    names = {re.split(r"[<>=!~ \[]", line)[0] for line in lines}
    assert not names & {"torch", "torchvision", "torchaudio", "numpy", "pillow"}
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines), lines  # lower bounds alone
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    bounds = set(project["project"]["dependencies"])
    assert {line for line in lines if not line.startswith(("cmake", "ninja"))} <= bounds
    # What ComfyUI's registry requires, and what it shows.
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= set(project["tool"]["comfy"])
    repository = project["project"]["urls"]["Repository"]
    icon = project["tool"]["comfy"]["Icon"]
    assert re.fullmatch(r"https://github.com/[\w-]+/[\w-]+", repository)
    assert icon.startswith(repository.replace("//github.com", "//raw.githubusercontent.com") + "/main/")
    assert (ROOT / icon.partition("/main/")[2]).is_file()


# What ComfyUI-Manager's scanner reads as the registration of nodes, in any Python file of the repository.
REGISTERED = re.compile(
    r"_CLASS_MAPPINGS\s*(:\s*\w+\s*)?=\s*(\\\s*)?{|_CLASS_MAPPINGS\[[\"']|\(\w*\.?ComfyNode\):|register_node\(\""
)


def test_a_scanner_of_the_text_finds_our_nodes_and_no_others():
    names = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    names = [name for name in names if not re.search(r"(^|/)(\.|build)", name.as_posix())]
    files = {name.as_posix(): (ROOT / name).read_text(encoding="utf-8") for name in names}
    own = {name for name, text in files.items() if REGISTERED.search(text)}
    assert {name.split("/")[0] for name in own} == {"comfyui_nodes"}
    found = [node for name in own for node in re.findall(r'node_id="(\w+)"', files[name])]
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert sorted(found) == sorted(listed) and len(found) >= 17
    assert re.search("^@title: GPSToken$", files["__init__.py"], re.M)
