"""The shape of the package: which part may import which, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lower layers first; a file imports from its own layer or from lower ones.
LAYERS = [
    ("safe_files", "assets", "tiling", "geometry", "picture_files", "folder_files"),
    ("token_files",),
    ("tokens",),
    ("token_editing",),
    ("token_matching",),
    ("ops",),
    ("layouts",),
    ("image_processor", "visualization"),
    ("models",),
    ("schedulers",),
    ("evaluation",),
    ("training", "pipelines"),
    ("cli", "benchmark", "comfyui_nodes", "modular", "__main__"),
]
# Of one layer, and still apart: what both need lies in a lower one.
APART = {"training": "pipelines", "pipelines": "training"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def package_files() -> list[tuple[str, Path]]:
    files = []
    for folder in ("gpstoken_diffusers", "pipelines", "comfyui_nodes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "gpstoken-mini" in path.parts:
                continue  # what save_pretrained wrote, for diffusers to run
            relative = path.relative_to(ROOT).with_suffix("")
            parts = relative.parts[1:] if folder == "gpstoken_diffusers" else relative.parts
            files.append((".".join(parts), path))
    return files


def imported_parts(name: str, path: Path) -> set[str]:
    """First parts below gpstoken_diffusers of everything that a file imports from the package."""
    package = ["gpstoken_diffusers", *name.split(".")]
    if path.name != "__init__.py":
        package = package[:-1]
    elif name.endswith("__init__"):
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            modules = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "gpstoken_diffusers" and len(parts) > 1 and parts[1] in LEVEL:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("name, path", package_files(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(name, path):
    part = name.split(".")[0]
    if part == "__init__":
        return  # the lazy front door names every layer
    assert part in LEVEL, f"{part} has no place in the layers: add it to LAYERS"
    imported = imported_parts(name, path)
    above = {other for other in imported if LEVEL[other] > LEVEL[part] or other == APART.get(part)}
    assert not above, f"{name} imports from layers that it must not know: {sorted(above)}"


ROOMS = {path.parent.name: path for _, path in package_files() if path.name == "__init__.py"}


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
def test_each_room_says_its_rule(room):
    """In the first line of its docstring, and has its place on the map."""
    first_line = (ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    assert first_line.endswith("."), "the first line is the rule of the room, a whole sentence"
    # The folder that a command of an earlier version still needs has no rule of its own.
    assert room.parent.name == "benchmark" or f"{room.parent.name}/" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_only_the_native_module_knows_the_libraries():
    """csrc's, that is; NVIDIA's compiler and driver have a module each."""
    loading = {name for name, path in package_files() if "ctypes.CDLL(" in path.read_text(encoding="utf-8")}
    assert loading == {"ops.backend.native", "ops.backend.nvrtc", "ops.backend.cuda_driver"}


def run_fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = run_fresh(
        "import sys, gpstoken_diffusers\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'PIL') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_public_names_are_there():
    names = run_fresh("import gpstoken_diffusers as g\nprint([getattr(g, n) is not None for n in g.__all__])")
    assert "False" not in names
    assert "True" in names


def test_a_plain_checkout_finds_its_parts():
    """ComfyUI clones are used without being installed."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport gpstoken_diffusers.pipelines as p\nprint(p.__file__)"
    assert run_fresh(code).strip() == str(ROOT / "pipelines" / "__init__.py")


def makes_tensors_only(node: ast.AST) -> bool:
    """Whether this is a call of PyTorch's restricted unpickler."""
    return isinstance(node, ast.Call) and any(
        word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
        for word in node.keywords
    )


def test_no_pickle_is_ever_loaded():
    """Two exceptions: weights of torch.save, of which tensors alone are made, and an unpickler cut down to arrays.

    `layouts/official_pickle.py` says how the latter is cut down, and its tests try to break out.
    """
    for name, path in package_files():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        harmless = [node.func for node in nodes if name == "evaluation.weight_files" and makes_tensors_only(node)]
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node not in harmless:
                called = (node.value.id, node.attr)
                if name != "layouts.official_pickle":
                    assert called not in {("pickle", "Unpickler"), ("pickle", "_Unpickler")}, name
                assert called not in {("pickle", "load"), ("pickle", "loads"), ("torch", "load")}, name


def test_version_and_requirements_are_said_alike_everywhere():
    """pyproject.toml is read by pip, `__version__` at run time, requirements.txt by ComfyUI-Manager."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert run_fresh("import gpstoken_diffusers; print(gpstoken_diffusers.__version__)").strip() == project["version"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for_nodes = {line for line in lines if line and not line.startswith(("#", "cmake", "ninja"))}
    # ComfyUI brings these itself; naming torch would replace its own.
    comfyuis = ("numpy", "pillow", "torch", "torchvision")
    assert for_nodes == {line for line in project["dependencies"] if not line.startswith(comfyuis)}
