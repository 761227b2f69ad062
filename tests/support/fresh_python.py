"""Python processes that know diffusers and nothing of this package yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

# Importing diffusers takes seconds: one process does it, and every case runs in a fork of that process.
_SERVER = """
import hashlib, json, os, sys
import torch
from diffusers import DiffusionPipeline

def trusted(folder, **settings):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **settings)

def own(folder, **settings):
    from gpstoken_diffusers import GPSTokenPipeline
    return GPSTokenPipeline.from_pretrained(folder, **settings)

def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    layout = {} if pipe.layout_model is not None else {"layout": torch.tensor([[0.3, 0.3, 0.0, 0.1, -0.2]] * 6)}
    images = pipe(0, num_inference_steps=2, layout_num_inference_steps=2, generator=seed, output_type="np", **layout)
    return hashlib.sha256(images.images.tobytes()).hexdigest()

torch.set_num_threads(1)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a case prints is no answer
if "gpstoken_diffusers" in sys.modules:
    sys.exit("diffusers has imported gpstoken_diffusers by itself")
for line in sys.stdin:
    case = os.fork()
    if case == 0:
        names = json.loads(line)
        names = {**globals(), **names}
        try:
            exec(names["code"], names)
            answer = {"result": names.get("result")}
        except Exception as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\\n")
        answers.flush()
        os._exit(0)
    status = os.waitpid(case, 0)[1]
    if status != 0:
        answers.write(json.dumps({"raised": f"Crash: status {status}"}) + "\\n")
        answers.flush()
"""


class Raised(Exception):
    """What a case raised: the type's name and the message."""


class FreshPython:
    """Runs code in processes in which diffusers is imported, and nothing else.

    Args:
        home: where these processes keep what they download and the code that they run.
        hub: address of the Hub that they know.
    """

    def __init__(self, home: Path, hub: str):
        environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": hub, "OMP_NUM_THREADS": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            env=environment,
            cwd=Path(__file__).parent,  # at the root of a checkout its sources would hide the installed package
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, code: str, **names: Any) -> Any:
        """Runs `code` with these names (text and numbers), and gives what it calls `result`.

        It also has `DiffusionPipeline`, `sys`, `torch`, the two ways to load, `trusted(folder)` and `own(folder)`, and
        `picture(pipe)`, what a pipeline draws for one seed. Raises [`Raised`] for whatever it raises.
        """
        names = {name: str(value) if isinstance(value, Path) else value for name, value in names.items()}
        self.process.stdin.write(json.dumps({**names, "code": textwrap.dedent(code)}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("The process that runs the cases has ended: its own error is above.")
        answer = json.loads(line)
        if "raised" in answer:
            raise Raised(answer["raised"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
