"""Folders of pipelines load by plain diffusers where the user trusts them, and by our classes without trust.

All in processes that have not imported this package, from a disk and from a Hub.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fresh_python import FreshPython, Raised
from local_hub import LocalHub
from pipeline_zoo import tiny_pipeline
from safetensors.torch import load_file

import gpstoken_diffusers
from gpstoken_diffusers import GPSTokenPipeline, GPSTokenSDEScheduler
from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS

WEIGHTS = "diffusion_pytorch_model.safetensors"
OURS = ("autoencoder", "transformer", "layout_model", "scheduler", "image_processor")
PIPELINES = [name for name in gpstoken_diffusers.__all__ if name.endswith("Pipeline")]

# The names of fresh_python for plain diffusers with trust, and for our class without.
both_ways = pytest.mark.parametrize("load", ["trusted", "own"])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = LocalHub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def fresh(hub, tmp_path_factory):
    python = FreshPython(tmp_path_factory.mktemp("home"), hub.address)
    yield python
    python.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_pipeline(scheduler=GPSTokenSDEScheduler()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def picture(fresh, folder):
    """What the pipeline in `folder` draws, by plain diffusers."""
    return fresh("result = picture(trusted(folder))", folder=folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


# ---------------------------------------------------------------------- what is written


def test_the_index_names_this_package_and_no_path(folder):
    index = read_json(folder / "model_index.json")
    assert index["_class_name"] == ["pipeline", "GPSTokenPipeline"]
    assert index["autoencoder"] == ["gpstoken_diffusers", "AutoencoderGPSToken"]
    assert index["scheduler"] == ["gpstoken_diffusers", "GPSTokenSDEScheduler"]
    assert index["layout_scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["id2label"]["1"] == "Food & Drink"
    code = {str(path.parent.relative_to(folder)) for path in folder.rglob("gpstoken_diffusers.py")}
    assert code == set(OURS)


@both_ways
def test_saving_what_was_loaded_gives_the_same_files(fresh, folder, tmp_path, load):
    fresh(f"{load}(folder).save_pretrained(target)", folder=folder, target=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


# ---------------------------------------------------------------------- the two ways to load a folder


def test_diffusers_alone_loads_a_trusted_folder(fresh, folder, picture):
    known, modules, drawn = fresh(
        """
        known = "gpstoken_diffusers" in sys.modules
        pipe = trusted(folder)
        result = known, [type(pipe).__module__, type(pipe.transformer).__module__], picture(pipe)
        """,
        folder=folder,
    )
    assert known is False
    package = "gpstoken_diffusers"
    assert modules == [f"{package}.pipelines.pipeline_gpstoken", f"{package}.models.transformer_gpstoken"]
    assert drawn == picture


@both_ways
def test_what_was_saved_draws_the_same_picture_in_another_process(fresh, tmp_path, load):
    # Not in this process: what other tests did to it (threads, compiled graphs) may change the last bits.
    saved = fresh(
        """
        from pipeline_zoo import tiny_pipeline
        pipe = tiny_pipeline()
        result = picture(pipe)
        pipe.save_pretrained(target)
        """,
        target=tmp_path / "saved",
    )
    assert fresh(f"result = picture({load}(folder))", folder=tmp_path / "saved") == saved


def test_diffusers_alone_refuses_a_folder_that_is_not_trusted(fresh, folder):
    with pytest.raises(Raised, match=r"(?s)ValueError: .*pipeline\.py.*trust_remote_code=True"):
        fresh("DiffusionPipeline.from_pretrained(folder)", folder=folder)


def test_our_class_loads_with_installed_code_only(fresh, copy, picture):
    for file in copy.rglob("*.py"):
        file.write_text("raise RuntimeError('code of the folder was run')")
    assert fresh("result = picture(own(folder))", folder=copy) == picture
    with pytest.raises(Raised, match="code of the folder was run"):
        fresh("trusted(folder)", folder=copy)


def test_the_hub(fresh, hub, folder, picture):
    shutil.copytree(folder, hub.root / "someone" / "tokens")
    with pytest.raises(Raised, match=r"(?s)ValueError: .*pipeline\.py.*trust_remote_code=True"):
        fresh("DiffusionPipeline.from_pretrained('someone/tokens')")
    for load in ("trusted", "own"):
        code = f"pipe = {load}('someone/tokens', cache_dir=cache, local_files_only=offline)"
        code += "\nresult = picture(pipe), pipe.name_or_path"
        hub.downloaded.clear()
        cache = hub.root / f"cache of {load}"
        assert fresh(code, cache=cache, offline=False) == [picture, "someone/tokens"]
        assert f"transformer/{WEIGHTS}" in hub.downloaded
        hub.downloaded.clear()
        assert fresh(code, cache=cache, offline=True) == [picture, "someone/tokens"]
        assert hub.downloaded == []


def test_a_repository_without_safetensors_is_refused(fresh, hub, folder):
    repository = shutil.copytree(folder, hub.root / "someone" / "pickles")
    weights = repository / "transformer" / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    hub.downloaded.clear()
    with pytest.raises(Raised, match="OSError: .*safetensors"):
        fresh("own('someone/pickles')")
    assert not [name for name in hub.downloaded if name.endswith(".bin")]


def test_a_subclass_of_a_user_loads_both_ways_back(folder, tmp_path, picture, fresh):
    code = """
        from gpstoken_diffusers import GPSTokenPipeline
        class Mine(GPSTokenPipeline):
            pass
        pipe = Mine.from_pretrained(folder)
        pipe.save_pretrained(target)
        result = picture(Mine.from_pretrained(target))
    """
    assert fresh(code, folder=folder, target=tmp_path / "mine") == picture
    # It cannot be found by anybody else.
    assert read_json(tmp_path / "mine" / "model_index.json")["_class_name"] == "Mine"
    assert not (tmp_path / "mine" / "pipeline.py").exists()
    with pytest.raises(ValueError, match="the folder of a Mine, which GPSTokenPipeline cannot load"):
        GPSTokenPipeline.from_pretrained(tmp_path / "mine")


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_this_package_share_their_folders(fresh, folder, tmp_path, name):
    """Saved by the first, loaded by another; saved by the other, loaded by both."""
    other = getattr(gpstoken_diffusers, name)
    pipe = other.from_pretrained(folder)
    assert type(pipe) is other
    pipe.save_pretrained(tmp_path)
    assert GPSTokenPipeline.from_pretrained(tmp_path).id2label == pipe.id2label
    assert fresh("result = type(trusted(folder)).__name__", folder=tmp_path) == name
    again = other.from_pipe(GPSTokenPipeline.from_pretrained(folder))
    assert type(again) is other
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model_index.json").read_bytes() == (tmp_path / "model_index.json").read_bytes()


@pytest.mark.parametrize("part", ["autoencoder", "transformer", "layout_model"])
def test_auto_model_loads_each_network(fresh, hub, folder, part):
    if not (hub.root / "someone" / "networks").exists():
        shutil.copytree(folder, hub.root / "someone" / "networks")
    code = """
        from diffusers import AutoModel
        model = AutoModel.from_pretrained(place, subfolder=part, trust_remote_code=True)
        weights = model.state_dict()
        result = type(model).__name__, [float(value.double().sum()) for value in weights.values()]
    """
    expected = load_file(folder / part / WEIGHTS)
    for place, start in ((folder, ""), ("someone/networks", ""), (folder, "import gpstoken_diffusers\n")):
        name, sums = fresh(start + textwrap.dedent(code), place=place, part=part)
        assert name == read_json(folder / part / "config.json")["_class_name"]
        assert sorted(sums) == sorted(float(value.double().sum()) for value in expected.values())
    with pytest.raises(Raised, match="trust_remote_code"):
        fresh(code.replace(", trust_remote_code=True", ""), place=folder, part=part)


# ---------------------------------------------------------------------- the files of code


def test_custom_pipeline_finds_one_class(fresh, folder, picture):
    """With our class, the index has no say: diffusers takes whatever single pipeline pipeline.py holds."""
    code = "result = picture(own(folder, custom_pipeline=folder, trust_remote_code=True))"
    assert fresh(code, folder=folder) == picture
    assert fresh("result = picture(trusted(folder, custom_pipeline=folder))", folder=folder) == picture


THEIRS = """
from diffusers import DiffusionPipeline

class Theirs(DiffusionPipeline):
    def __init__(self, autoencoder, transformer, scheduler, image_processor, layout_model, layout_scheduler):
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.register_modules(**given)
"""


def test_pipelines_of_others_find_our_components(fresh, folder, tmp_path, picture):
    """They go through the files beside the weights, all within a second and to one place."""
    (tmp_path / "theirs.py").write_text(THEIRS)  # handed over without its ending, or the folder's pipeline.py is taken
    code = """
        pipe = trusted(folder, custom_pipeline=theirs)
        from gpstoken_diffusers import GPSTokenPipeline
        result = type(pipe).__name__, picture(GPSTokenPipeline(**pipe.components))
    """
    assert fresh(code, folder=folder, theirs=tmp_path / "theirs") == ["Theirs", picture]


def test_a_missing_package_says_how_to_install_it(fresh, folder):
    blocked = """
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "gpstoken_diffusers":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Blocker())
    """
    with pytest.raises(Raised, match="ImportError: .*No module named.*pip install -U gpstoken-diffusers"):
        fresh(blocked + "\n        trusted(folder)", folder=folder)
    shim = folder / "autoencoder" / "gpstoken_diffusers.py"
    with pytest.raises(Raised, match="ImportError: .*No module named.*pip install -U gpstoken-diffusers"):
        fresh(blocked + "\n        exec(open(shim).read())", shim=shim)


def test_python_in_a_component_folder_says_what_is_wrong(copy):
    """There the file is found in place of the package."""
    command = [sys.executable, "-c", "import gpstoken_diffusers"]
    ran = subprocess.run(command, cwd=copy / "autoencoder", capture_output=True)
    assert "start Python in another folder" in ran.stderr.decode()


# ---------------------------------------------------------------------- what can be asked of either way


@both_ways
def test_variants(fresh, copy, tmp_path, load):
    """A folder may hold whole weights, half ones, or both; each loads by its name alone."""
    pipe = GPSTokenPipeline.from_pretrained(copy).to(torch.float16)
    for folder in (copy, tmp_path / "half"):
        pipe.save_pretrained(folder, variant="fp16")
        code = f"""
            pipe = {load}(folder, variant="fp16", dtype=torch.float16)
            result = str(pipe.dtype), pipe.transformer.class_embedding.weight.double().sum().item()
        """
        total = pipe.transformer.class_embedding.weight.double().sum().item()
        assert fresh(code, folder=folder) == ["torch.float16", total]
    assert fresh(f"result = str({load}(folder).dtype)", folder=copy) == "torch.float32"
    with pytest.raises(Raised, match="OSError: .*diffusion_pytorch_model.safetensors"):
        fresh(f"{load}(folder)", folder=tmp_path / "half")


@both_ways
def test_data_types(fresh, folder, load):
    code = f"""
        pipe = {load}(folder, dtype=dict(default=torch.bfloat16, autoencoder=torch.float32))
        whole = {load}(folder, dtype=torch.bfloat16)
        parts = pipe.autoencoder, pipe.transformer, pipe.layout_model, whole.autoencoder
        result = [str(part.dtype) for part in parts]
    """
    # The layout model computes in float32 always.
    assert fresh(code, folder=folder) == ["torch.float32", "torch.bfloat16", "torch.float32", "torch.bfloat16"]


@both_ways
def test_shards(fresh, folder, tmp_path, picture, load):
    GPSTokenPipeline.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert fresh(f"result = picture({load}(folder))", folder=tmp_path) == picture


@both_ways
def test_no_layout_model(fresh, folder, tmp_path, picture, load):
    pipe = tiny_pipeline(layout_model=None, layout_scheduler=None)
    pipe.save_pretrained(tmp_path)
    assert read_json(tmp_path / "model_index.json")["layout_model"] == [None, None]
    code = f"""
        pipe = {load}(folder)
        missing, drawn = pipe.layout_model is None, picture(pipe)
        whole = {load}(other)
        # DiffusionPipeline.from_pretrained does not heed such a None.
        without = picture(own(other, layout_model=None, layout_scheduler=None, scheduler=pipe.scheduler))
        # diffusers itself never saves a component that was None when the pipeline was made.
        pipe.layout_model, pipe.layout_scheduler = whole.layout_model, whole.layout_scheduler
        pipe.scheduler = whole.scheduler
        pipe.save_pretrained(folder)
        result = missing, drawn == without, picture({load}(folder))
    """
    assert fresh(code, folder=tmp_path, other=folder) == [True, True, picture]


@both_ways
@pytest.mark.parametrize("name", sorted(SAMPLER_PRESETS))
def test_swapped_schedulers_come_back(fresh, folder, tmp_path, load, name):
    """By from_config, from the saved SDE scheduler to each of the menu."""
    code = f"""
        pipe = {load}(folder)
        from gpstoken_diffusers.schedulers.presets import SAMPLER_PRESETS
        wanted = type(SAMPLER_PRESETS[name].make())
        pipe.scheduler = wanted.from_config(pipe.scheduler.config)
        pipe.save_pretrained(target)
        result = wanted.__name__, picture(pipe)
    """
    scheduler, drawn = fresh(code, folder=folder, target=tmp_path, name=name)
    code = f"pipe = {load}(folder); result = type(pipe.scheduler).__name__, picture(pipe)"
    assert fresh(code, folder=tmp_path) == [scheduler, drawn]


@both_ways
def test_components_that_are_handed_in(fresh, copy, load):
    """Their folders need not be there."""
    shutil.rmtree(copy / "scheduler")
    code = f"""
        from diffusers import FlowMatchHeunDiscreteScheduler
        scheduler = FlowMatchHeunDiscreteScheduler()
        pipe = {load}(folder, scheduler=scheduler)
        result = pipe.scheduler is scheduler, pipe.config.scheduler
    """
    assert fresh(code, folder=copy) == [True, ["diffusers", "FlowMatchHeunDiscreteScheduler"]]


@both_ways
def test_device_maps(fresh, folder, picture, load):
    """diffusers does not hand trust on to components here; ours need none."""
    code = f"result = [picture({load}(folder, device_map=name)) for name in ('balanced', 'cpu')]"
    assert fresh(code, folder=folder) == [picture, picture]


@both_ways
def test_offloading_follows_the_stages(fresh, folder, picture, load):
    code = f"""
        pipe = {load}(folder).to("cpu")
        plain = picture(pipe)
        order = []
        for name in ("layout_model", "transformer", "autoencoder"):
            getattr(pipe, name).register_forward_pre_hook(lambda module, given, name=name: order.append(name))
        pipe.enable_model_cpu_offload(device="cpu")
        hooked = [type(hook.model).__name__ for hook in pipe._all_hooks]
        before = [hook.hook.prev_module_hook for hook in pipe._all_hooks]
        chained = [before[0] is None, before[1] is pipe._all_hooks[0], before[2] is pipe._all_hooks[1]]
        result = plain, picture(pipe), hooked, chained, list(dict.fromkeys(order)), len(pipe._all_hooks)
    """
    plain, offloaded, hooked, chained, order, kept = fresh(code, folder=folder)
    assert plain == offloaded == picture
    assert hooked == ["GPSTokenLayoutModel", "GPSTokenTransformerModel", "AutoencoderGPSToken"]
    assert all(chained)
    assert order[:2] == ["layout_model", "transformer"]
    assert kept == 3
