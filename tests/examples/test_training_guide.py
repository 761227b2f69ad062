"""The guide in examples/README.md: its commands, in its order, at toy size, with two processes where it launches."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from script_runs import ROOT, run_script
from training_runs import make_photographs

from gpstoken_diffusers import GPSTokenPipeline

GUIDE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
LOOP = "--batch_size 1 --max_train_steps 2 --num_workers 0 --warmup_steps 1 --report_to none --mixed_precision no"
# What is appended to the guide's commands; what is given last wins.
TOY = {
    "train_autoencoder.py": f"{LOOP} --resolution 64 --num_tokens 16 --max_validation_images 2",
    "evaluate_reconstruction.py": "--models runs/tokenizer/model --resolutions 64 --max_images 2 --baselines regions "
    "--perceptual none --features none --device cpu",
    "encode_dataset.py": "--num_tokens 8 --views 2 --batch_size 2 --num_workers 0",
    "train_layout.py": f"{LOOP} --config tiny.json",
    "train_texture.py": f"{LOOP} --config tiny.json",
    "assemble_pipeline.py": "",
    "generate": "-n 1 --steps 2 --device cpu",
}


def commands() -> list[list[str]]:
    """The guide's command lines, but the one that fetches photographs."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line) for line in blocks.splitlines() if line.strip()]
    return [line for line in lines if "examples/mini_corpus/fetch_photographs.py" not in line]


@pytest.mark.slow
def test_the_guide_runs_from_a_folder_of_pictures_to_a_generator(tmp_path):
    for name, count in (("train", 4), ("heldout", 2)):
        make_photographs(tmp_path / "data" / "photographs" / name, count, size=(120, 90))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "gpstoken_diffusers").symlink_to(ROOT / "gpstoken_diffusers")  # the shipped model's path
    (tmp_path / "tiny.json").write_text(json.dumps({"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}))
    seen = set()
    for program, *arguments in commands():
        launched = program == "accelerate"
        if program == "gpstoken":
            name, command = arguments[0], ["gpstoken_diffusers", *arguments]
        else:
            assert program == "python" or arguments.pop(0) == "launch"
            name, command = Path(arguments[0]).name, arguments
        run_script([*command, *shlex.split(TOY[name])], tmp_path, processes=2 if launched else 1)
        seen.add(name)
    assert seen == set(TOY)
    for name in ("runs/tokenizer/validation.png", "runs/texture/samples.png", "runs/layout/layouts.png"):
        assert (tmp_path / name).is_file(), name
    assert " 2 x " in (tmp_path / "runs" / "tokenizer" / "model" / "README.md").read_text()  # processes
    assert Image.open(tmp_path / "runs" / "generated.png").size[0] >= 64
    pipe = GPSTokenPipeline.from_pretrained(tmp_path / "runs" / "pipeline")
    assert pipe.id2label == {0: "train"}
    assert pipe.autoencoder.config.sample_size == 64


def test_the_guide_names_no_option_that_does_not_exist():
    """Those of its table, which the run above does not take."""
    named = set(re.findall(r"--[a-z_0-9]+", GUIDE))
    sources = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "gpstoken_diffusers").rglob("*.py")]
    known = set(re.findall(r'"(--[a-z_0-9]+)"', "".join(path.read_text(encoding="utf-8") for path in sources)))
    assert named - known <= {"--logdir"}, "an option of TensorBoard"
