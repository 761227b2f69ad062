"""The harness itself, on a server without our nodes: what it promises to the tests of the nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from comfyui import fetch_comfyui
from comfyui.comfyui_client import ExecutionFailed, PromptRefused
from comfyui.comfyui_server import ComfyUIServer, copy_checkout, end_group
from comfyui.conftest import missing
from comfyui.fetch_comfyui import VERSION, ServerInstall, Unobtainable

PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 48, "height": 32, "batch_size": 2, "color": 0x3366FF}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}

# A node that takes its time and heeds interruptions, and fails where it cannot.
SLEEP = """
import time
import comfy.model_management

class Sleep:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"seconds": ("FLOAT", {"min": -1.0, "max": 100.0})}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "sleep", True, "tests"

    def sleep(self, seconds):
        if seconds < 0:
            raise ValueError("time should go forwards")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.02)
        return ()

NODE_CLASS_MAPPINGS = dict(Sleep=Sleep)  # ComfyUI-Manager looks for braces
"""


# A workflow file.
NAP = {
    "version": 0.4,
    "nodes": [{"id": 7, "type": "Sleep", "pos": [300, 300], "size": [210, 60], "widgets_values": [0.5]}],
    "links": [],
}


def _sleep(seconds: float) -> dict:
    return {"7": {"class_type": "Sleep", "inputs": {"seconds": seconds}}}


def _ends(process: int) -> bool:
    """Whether a process that is not ours is gone within seconds."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # ended, though its parent has not asked yet
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def server(server_install):
    nodes = {"sleep/__init__.py": SLEEP, "sleep/examples/nap.json": json.dumps(NAP)}
    with ComfyUIServer(server_install, None, nodes) as server:
        process, folder = server.process, server.folder
        yield server
    assert process.poll() is not None and not folder.exists()
    with pytest.raises(RuntimeError, match="not running any more"):
        server.get_json("/system_stats")


@pytest.fixture(scope="module")
def page(server, open_page):
    return open_page(server, "Sleep")


# ---- the server ----


def test_runs_a_workflow_and_gives_its_pictures(server):
    assert server.get_json("/system_stats")["system"]["comfyui_version"] == VERSION
    prompt_id = server.queue(PICTURE)
    entry = server.wait(prompt_id)
    assert entry["outcome"] == "success"
    assert [event for event, _ in server.events(prompt_id)][-1] == "execution_success"
    pictures = server.images(entry)
    assert list(pictures) == ["2"] and len(pictures["2"]) == 2
    assert pictures["2"][0].size == (48, 32) and pictures["2"][0].getpixel((5, 5)) == (0x33, 0x66, 0xFF)
    server.free()
    assert "EmptyImage" in server.object_info() and server.object_info("NoSuchNode") == {}
    assert "Starting server" in server.log()


def test_refused_workflows_say_which_node_is_wrong(server):
    workflow = {**PICTURE, "1": {"class_type": "EmptyImage", "inputs": {**PICTURE["1"]["inputs"], "width": -3}}}
    with pytest.raises(PromptRefused, match=r"node 1 \(EmptyImage\).*width") as caught:
        server.queue(workflow)
    assert list(caught.value.node_errors) == ["1"]
    with pytest.raises(PromptRefused, match="NoSuchNode"):
        server.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_failures_of_nodes_carry_their_traceback(server):
    with pytest.raises(ExecutionFailed, match="time should go forwards") as caught:
        server.run(_sleep(-1))
    failure = caught.value
    assert (failure.node_id, failure.node_type, failure.exception_type) == ("7", "Sleep", "ValueError")
    assert "custom_nodes/sleep" in failure.traceback and failure.entry["status"]["status_str"] == "error"


def test_interruptions_are_told_from_failures(server):
    prompt_id = server.queue(_sleep(60))
    with pytest.raises(TimeoutError, match=prompt_id):
        server.wait(prompt_id, timeout=0.5)
    server.interrupt()
    assert server.wait(prompt_id, timeout=10)["outcome"] == "interrupted"


def test_uploaded_pictures_come_back(server, tmp_path):
    picture = Image.linear_gradient("L").convert("RGB").resize((40, 24))
    picture.save(tmp_path / "gradient.png")
    for source in (picture, tmp_path / "gradient.png"):
        load = {"class_type": "LoadImage", "inputs": {"image": server.upload_image(source)}}
        entry = server.run({"1": load, "2": PICTURE["2"]})
        assert server.images(entry)["2"][0].tobytes() == picture.tobytes()


def test_its_environment_is_that_of_someone_who_has_comfyui_alone(server):
    assert {"torch", "transformers", "aiohttp"} <= set(server.packages_before)
    assert not {"diffusers", "accelerate", "gpstoken_diffusers"} & set(server.packages_before)
    assert server.packages_after == server.packages_before
    assert "/gpstoken_diffusers" not in server.log()


def test_a_server_that_does_not_start_shows_its_log(server_install, tmp_path):
    with pytest.raises(RuntimeError, match="main.py"):
        ComfyUIServer(ServerInstall(tmp_path, server_install.packages), None).__enter__()


# ---- the page ----


def test_page_opens_queues_and_shows_a_workflow(server, page, artefacts, tmp_path):
    ui_workflow = page.ui_workflow_from_api(PICTURE)
    assert {node["type"] for node in ui_workflow["nodes"]} == {"EmptyImage", "PreviewImage"}
    path = tmp_path / "picture.json"
    path.write_text(json.dumps(ui_workflow))
    page.open()
    page.open_workflow(path)
    inputs = page.api_workflow()["1"]["inputs"]
    assert {name: inputs[name] for name in PICTURE["1"]["inputs"]} == PICTURE["1"]["inputs"]
    entry = page.queue_and_wait()
    assert entry["outcome"] == "success" and server.images(entry)["2"][0].size == (48, 32)
    page.screenshot(artefacts / "harness.png")
    seen = Image.open(artefacts / "harness.png").convert("RGB")
    assert seen.size == page.size
    assert (0x33, 0x66, 0xFF) in {color for _, color in seen.getcolors(1 << 24)}  # the preview
    assert page.errors == []


def test_page_opens_a_template(page):
    page.open_template("nap", "sleep")
    assert page.api_workflow()["7"]["inputs"] == {"seconds": 0.5}
    assert page.queue_and_wait()["outcome"] == "success"


def test_page_raises_what_the_server_does(page):
    page.ui_workflow_from_api(_sleep(-1))
    with pytest.raises(ExecutionFailed, match="time should go forwards"):
        page.queue_and_wait()
    page.ui_workflow_from_api({"1": PICTURE["2"] | {"inputs": {}}})
    with pytest.raises(PromptRefused, match="images"):
        page.queue_and_wait()
    with pytest.raises(ValueError, match="NoSuchNode"):
        page.ui_workflow_from_api({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_page_notices_an_interruption(server, page):
    page.ui_workflow_from_api(_sleep(60))
    interruption = threading.Timer(2, server.interrupt)
    interruption.start()
    assert page.queue_and_wait(timeout=30)["outcome"] == "interrupted"


def test_mouse_moves_a_node(page):
    page.open()
    page.ui_workflow_from_api(_sleep(1))
    page.fit_view()
    x, y = page.evaluate("() => [...app.graph.nodes[0].pos]")
    start, end = page.position(x + 60, y - 12), page.position(x + 160, y + 38)  # by its title
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=5)
    page.mouse.up()
    moved = page.evaluate("() => [...app.graph.nodes[0].pos]")
    assert moved == pytest.approx([x + 100, y + 50], abs=15)


def test_page_counts_errors_of_our_files_only(page):
    page.open()
    page.evaluate("() => fetch('/extensions/elsewhere/x.js')")
    page.evaluate("() => fetch('/extensions/gpstoken_diffusers/x.js')")
    page.evaluate("() => { setTimeout(() => { throw new Error('in /extensions/gpstoken_diffusers/y.js') }) }")
    page.page.wait_for_timeout(300)
    assert any("elsewhere" in error for error in page.all_errors)
    assert any("404" in error for error in page.errors) and any("y.js" in error for error in page.errors)
    assert not any("elsewhere" in error for error in page.errors)


# ---- fetching, and ending ----


def test_a_half_finished_fetch_is_not_taken_for_a_finished_one(tmp_path):
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise Unobtainable("no network")

    final = tmp_path / "part"
    with pytest.raises(Unobtainable):
        fetch_comfyui.make_once(final, fail)
    assert list(tmp_path.iterdir()) == []

    def slow(folder: Path) -> None:
        folder.mkdir()
        (folder / "first").touch()
        time.sleep(0.2)
        assert not final.exists() or (final / "last").exists()
        (folder / "last").touch()

    threads = [threading.Thread(target=fetch_comfyui.make_once, args=(final, slow)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(tmp_path.iterdir()) == [final] and (final / "last").exists()


def test_a_failed_command_is_told_in_one_line(capsys):
    with pytest.raises(Unobtainable, match=r"status 3: the reason$") as caught:
        fetch_comfyui.run([sys.executable, "-c", "print('much'); print('the reason'); raise SystemExit(3)"])
    assert "\n" not in str(caught.value) and "much" in capsys.readouterr().err


def test_what_is_missing_skips_or_fails(monkeypatch):
    monkeypatch.delenv("GPSTOKEN_REQUIRE_COMFYUI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium"):
        missing("no Chromium")
    monkeypatch.setenv("GPSTOKEN_REQUIRE_COMFYUI", "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        missing("no Chromium")


def test_chromium_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("GPSTOKEN_CHROMIUM", str(tmp_path / "none"))
    assert fetch_comfyui.find_chromium() is None
    monkeypatch.setenv("GPSTOKEN_CHROMIUM", sys.executable)
    assert fetch_comfyui.find_chromium() == sys.executable


def test_a_clone_holds_what_git_would(tmp_path):
    copy_checkout(tmp_path / "clone")
    assert (tmp_path / "clone" / "pyproject.toml").is_file()
    assert not list((tmp_path / "clone").rglob("__pycache__"))
    assert not (tmp_path / "clone" / "gpstoken_diffusers" / "lib").exists()


def test_nothing_outlives_the_tests():
    stubborn = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    stubborn += "; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
    child = int(process.stdout.readline())
    end_group(process, patience=0.3)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL and _ends(child)

    owner = """
        import os, signal, subprocess
        from comfyui.comfyui_server import watch
        process = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, start_new_session=True)
        watcher = watch(process)
        print(process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(owner)]
    killed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    assert _ends(int(killed.stdout))
