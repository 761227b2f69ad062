"""Official files from a Hub of this machine, over real HTTP: the header first, then a download."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from fresh_python import FreshPython, Raised
from golden_files import golden
from local_hub import LocalHub, write_released
from model_zoo import SMALL_CONFIG, load_golden, small_model
from safetensors.torch import save_file

from gpstoken_diffusers import AutoencoderGPSToken
from gpstoken_diffusers.models.hub_files import HubFile, hub_file

SMALL = "someone/small/weights/small.safetensors"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = LocalHub(tmp_path_factory.mktemp("hub"))
    (hub.root / SMALL).parent.mkdir(parents=True)
    shutil.copy(golden("ae_small_weights.safetensors"), hub.root / SMALL)
    released = hub.root / "xtudbxk" / "GPSToken"
    released.mkdir(parents=True)
    for preset in ("s64", "m128", "l256"):
        write_released(released / f"gpstoken_{preset}.safetensors", preset)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def python(hub, tmp_path_factory):
    python = FreshPython(tmp_path_factory.mktemp("home"), hub.address)
    yield python
    python.close()


@pytest.fixture
def load(hub, python, tmp_path):
    """`load(code)` runs it where there is a Hub and an empty cache, and gives what it calls `result`."""
    hub.forget()

    def load(code: str, **names):
        start = "from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenTransformerModel\n"
        start += "model_sum = lambda model: float(sum(value.double().sum() for value in model.state_dict().values()))\n"
        start += f"small = {SMALL!r}; config = {SMALL_CONFIG!r}; cache = {str(tmp_path / 'cache')!r}\n"
        return python(start + code, **names)

    yield load
    hub.cut_after, hub.sends_etag = None, True


@pytest.fixture(scope="module")
def small_sum():
    return float(sum(value.double().sum() for value in small_model().state_dict().values()))


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("site", ["https://huggingface.co/", "http://huggingface.co/", "huggingface.co/", "hf.co/",
                                  "https://www.huggingface.co/", "https://hf.co/"])  # fmt: skip
@pytest.mark.parametrize(
    "path, expected",
    [
        ("a/b/x.safetensors", ("a/b", "x.safetensors", None)),
        ("a/b/in/deep/x.safetensors", ("a/b", "in/deep/x.safetensors", None)),
        ("a/b/blob/main/x.safetensors", ("a/b", "x.safetensors", "main")),
        ("a/b/resolve/v1.0/in/x.safetensors?download=true", ("a/b", "in/x.safetensors", "v1.0")),
        ("a/b/raw/0123abc/x.safetensors", ("a/b", "x.safetensors", "0123abc")),
        ("a/b/blob/refs%2Fpr%2F3/x.safetensors", ("a/b", "x.safetensors", "refs/pr/3")),
        ("a/b/resolve/refs/pr/3/x.safetensors", ("a/b", "x.safetensors", "refs/pr/3")),
    ],
)
def test_addresses(site, path, expected):
    assert hub_file(site + path) == HubFile(*expected)
    if "?" not in path:
        assert hub_file(path) == HubFile(*expected)


@pytest.mark.parametrize("name", ["s64", "m128", "l256"])
def test_short_names(name):
    assert hub_file(name) == HubFile("xtudbxk/GPSToken", f"gpstoken_{name}.safetensors")


@pytest.mark.parametrize(
    "name",
    ["/a/b/x.safetensors", "./a/b/x.safetensors", "../a/b/x.safetensors", "~/a/b/x.safetensors", "a/b/x.ckpt",
     r"C:\a\b\x.safetensors", "x.safetensors", "L256", "runs/mini/checkpoint-4"],
)  # fmt: skip
def test_paths_are_not_looked_for_on_the_hub(name):
    file = hub_file(name)
    assert file is None or not file.repository.strip("/").count("/"), file


@pytest.mark.parametrize("address", ["https://example.com/a/b/x.safetensors", "https://hf.co/a/b/blob/main/x.ckpt",
                                     "https://huggingface.co/a/b", "ftp://hf.com/a/b/x.safetensors"])  # fmt: skip
def test_addresses_of_anything_else_are_refused(address):
    with pytest.raises(ValueError, match="Hub|safetensors"):
        hub_file(address)


# ---------------------------------------------------------------------- loading


def test_every_way_to_name_a_file_loads_it_once(hub, load, small_sum):
    sums = load(
        f"""
ways = [small, "hf.co/" + small, {hub.address!r} + "/someone/small/blob/main/weights/small.safetensors",
        "https://huggingface.co/someone/small/resolve/main/weights/small.safetensors"]
options = dict(cache_dir=cache, token=False, proxies=None, force_download=False, local_files_only=False)
result = [model_sum(AutoencoderGPSToken.from_single_file(way, config=config, **options)) for way in ways]
half = AutoencoderGPSToken.from_single_file(small, config=config, cache_dir=cache, torch_dtype=torch.float16)
offline = AutoencoderGPSToken.from_single_file(small, config=config, cache_dir=cache, local_files_only=True)
result += [str(half.dtype), str(half.geometry_head.dtype) if hasattr(half, "geometry_head") else "", model_sum(offline)]
"""
    )
    assert sums[:4] == [small_sum] * 4 and sums[-1] == small_sum
    assert sums[4] == "torch.float16"
    assert hub.downloaded == ["weights/small.safetensors"]  # once
    assert [asked for asked in hub.ranges if asked][0] == "bytes=0-100000"  # its header came first


@pytest.mark.slow  # 515 MB pass through HTTP, a disk and a model
def test_a_released_tokenizer_at_its_full_size(hub, load):
    result = load(
        """
model = AutoencoderGPSToken.from_pretrained("xtudbxk/GPSToken", preset="l256", cache_dir=cache)
again = AutoencoderGPSToken.from_single_file("l256", cache_dir=cache, local_files_only=True)
result = model.num_parameters(), model.config.texture_channels, model_sum(model), again.config.decode_mode
"""
    )
    shapes = json.loads(golden("official_autoencoder_keys_l256.json").read_text())["keys"]
    unused = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "temb_proj" in name)
    assert result == [sum(torch.Size(shape).numel() for shape in shapes.values()) - unused, 32, 0.0, "tile"]
    assert hub.downloaded == ["gpstoken_l256.safetensors"]


def test_presets_are_told_by_the_header_before_a_download(hub, load):
    """A full-size file is known for what it is, and refused as what it is not, by its first 100 KB."""
    cases = {
        "from_pretrained('xtudbxk/GPSToken', preset='xl')": "preset must be one of s64, m128, l256",
        "from_single_file('l256', preset='m128')": "'m128' has 16 texture channels.*has 32",
        "from_single_file('m128', config=config)": "does not fit the model.*differences",
        "from_single_file('hf.co/xtudbxk/GPSToken/gpstoken_s64.safetensors', config={'gps_num': 3})": "not fit",
    }
    for call, message in cases.items():
        with pytest.raises(Raised, match=f"(?s)ValueError: .*{message}"):
            load(f"AutoencoderGPSToken.{call[:-1]}, cache_dir=cache)")
    with pytest.raises(Raised, match="ValueError: xtudbxk/GPSToken/gpstoken_l256.safetensors holds no GPSToken gener"):
        load("GPSTokenTransformerModel.from_single_file('l256', cache_dir=cache)")
    assert hub.downloaded == []


def test_what_is_no_model_is_refused_before_a_download(hub, load):
    folder = hub.root / "someone" / "odd"
    folder.mkdir()
    save_file({"conv.weight": torch.zeros(4, 4)}, folder / "other.safetensors")
    (folder / "text.safetensors").write_bytes(b"not a model at all, just some text " * 9)
    for name, message in {"other": "holds no GPSToken autoencoder", "text": "not a whole safetensors file"}.items():
        with pytest.raises(Raised, match=f"ValueError: someone/odd/{name}.safetensors.*{message}"):
            load(f"AutoencoderGPSToken.from_single_file('someone/odd/{name}.safetensors', cache_dir=cache)")
    assert hub.downloaded == []


def test_a_repository_of_official_files_asks_which(load):
    with pytest.raises(Raised, match='(?s)OSError: .*preset="s64" or "m128" or "l256"'):
        load("AutoencoderGPSToken.from_pretrained('xtudbxk/GPSToken', cache_dir=cache)")


def test_an_official_file_in_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint at .*gpstoken_s64.safetensors"):
        AutoencoderGPSToken.from_pretrained(tmp_path, preset="s64")
    write_released(tmp_path / "gpstoken_s64.safetensors", "s64")
    with pytest.raises(ValueError, match="32 texture channels, but .* has 16"):
        AutoencoderGPSToken.from_single_file(tmp_path / "gpstoken_s64.safetensors", preset="l256")
    path = AutoencoderGPSToken.download_single_file(tmp_path / "gpstoken_s64.safetensors")
    assert path == tmp_path / "gpstoken_s64.safetensors"


def test_tensors_that_are_at_hand(small_sum):
    model = AutoencoderGPSToken.from_single_file(load_golden("ae_small_weights.safetensors"), config=SMALL_CONFIG)
    assert float(sum(value.double().sum() for value in model.state_dict().values())) == small_sum


# ---------------------------------------------------------------------- what goes wrong


def test_an_interrupted_download_resumes(hub, load, small_sum):
    """Not from its start, as huggingface_hub writes 10 MB at a time: so the model has 25 MB of company in its file."""
    tensors = {f"ema_model.{name}": value for name, value in load_golden("ae_small_weights.safetensors").items()}
    (hub.root / "someone" / "crowd").mkdir()
    save_file({**tensors, "discriminator": torch.zeros(6_250_000)}, hub.root / "someone" / "crowd" / "x.safetensors")
    hub.cut_after = 15_000_000
    code = "AutoencoderGPSToken.from_single_file('someone/crowd/x.safetensors', config=config, cache_dir=cache)"
    assert load(f"result = model_sum({code})") == small_sum
    header, whole, rest = hub.ranges
    assert (header, whole) == ("bytes=0-100000", None)
    assert 0 < int(rest.removeprefix("bytes=").removesuffix("-")) <= 15_000_000


def test_a_new_version_of_a_file_takes_the_place_of_the_old(hub, load):
    """The ETag tells: what is in the cache is not what the Hub has now."""
    folder = hub.root / "someone" / "versions"
    shutil.copytree(hub.root / "someone" / "small", folder)
    shutil.copytree(folder, folder.with_name("versions@v1"))
    code = """
name = "someone/versions/weights/small.safetensors"
model = AutoencoderGPSToken.from_single_file(name, config=config, cache_dir=cache, revision=revision)
result = float(model.state_dict()["refiner.geometry_head.bias"].sum())
"""
    before = load(code, revision=None)
    tensors = load_golden("ae_small_weights.safetensors")
    save_file({**tensors, "to_gps.0.bias": tensors["to_gps.0.bias"] + 1}, folder / "weights" / "small.safetensors")
    assert load(code, revision=None) == pytest.approx(before + 5, abs=1e-4)  # five channels
    assert load(code, revision="v1") == before
    at = code.replace('"someone/versions/', '"hf.co/someone/versions/resolve/v1/')
    assert load(at, revision=None) == load(at, revision="v1") == before
    with pytest.raises(Raised, match="ValueError: .*revision 'v1', the argument 'v2'"):
        load(at, revision="v2")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("someone/none/x.safetensors", "", "no such file here, and http.* has no repository someone/none"),
        ("someone/small/x.safetensors", "", "someone/small has no file x.safetensors"),
        (SMALL, "revision='v9'", "someone/small has no revision 'v9'"),
        (SMALL, "local_files_only=True", "no such file here nor in the cache .*/cache.*copy it here"),
        ("some..one/none/x.safetensors", "", "No checkpoint at some..one/none"),
        ("x.safetensors", "", "No checkpoint at x.safetensors"),
    ],
)
def test_what_is_not_there(load, name, options, message):
    with pytest.raises(Raised, match=f"(?s)FileNotFoundError: .*{message}"):
        load(f"AutoencoderGPSToken.from_single_file({name!r}, config=config, cache_dir=cache, {options})")


def test_a_hub_without_etags_is_refused(hub, load):
    hub.sends_etag = False
    with pytest.raises(Raised, match="FileNotFoundError: .*ETag.*copy it here"):
        load("AutoencoderGPSToken.from_single_file(small, config=config, cache_dir=cache)")


NO_NETWORK = "from huggingface_hub import constants; constants.ENDPOINT = 'http://127.0.0.1:9'\n"
NO_NETWORK += (
    "constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + '/{repo_id}/resolve/{revision}/{filename}'\n"
)


def test_no_network(load, small_sum):
    code = "result = model_sum(AutoencoderGPSToken.from_single_file(small, config=config, cache_dir=cache))"
    with pytest.raises(
        Raised, match="FileNotFoundError: No checkpoint at .*nor in the cache .*could not be downloaded"
    ):
        load(NO_NETWORK + code)
    assert load(code) == small_sum
    assert load(NO_NETWORK + code) == small_sum  # from the cache


# Root may write anywhere, unless it gives that up.
BOUND_BY_PERMISSIONS = """
import ctypes, os
if os.getuid() == 0:
    version, no_capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version, no_capabilities) == 0
"""


def test_a_cache_that_is_read_only(load, small_sum, tmp_path):
    """What is in it is used; what is not cannot be put there, which is said."""
    code = "result = model_sum(AutoencoderGPSToken.from_single_file(small, config=config, cache_dir=cache))"
    assert load(code) == small_sum
    for folder, _, _ in os.walk(tmp_path / "cache"):
        os.chmod(folder, 0o555)
    assert load(BOUND_BY_PERMISSIONS + code) == small_sum
    other = "AutoencoderGPSToken.from_single_file('m128', cache_dir=cache)"
    with pytest.raises(Raised, match="OSError: cannot download xtudbxk/GPSToken/gpstoken_m128.*cache_dir.*HF_HOME"):
        load(BOUND_BY_PERMISSIONS + other)
    for folder, _, _ in os.walk(tmp_path / "cache"):
        os.chmod(folder, 0o755)
