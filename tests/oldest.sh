#!/usr/bin/env bash
# The oldest versions that pyproject.toml allows, in a fresh environment: the main jobs, and tests that take little time.
#
#   bash tests/oldest.sh           everything at its oldest, PyTorch too: some GB, unless TORCH_INDEX says where the
#                                  builds for a CPU are (https://download.pytorch.org/whl/cpu)
#   bash tests/oldest.sh --quick   PyTorch, torchvision and numpy of the python3 that is active, the rest at its oldest;
#                                  the main jobs alone. CI runs this form.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

oldest() { # NAME...: each as NAME==VERSION
  for name in "$@"; do
    sed -n '/^dependencies = \[/,/^\]/s/^  "\('"$name"'\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml
  done
}
libraries=(accelerate diffusers safetensors transformers)
heavy=(numpy torch torchvision)

python3 -m venv "$work/venv"
python="$work/venv/bin/python"
if [ "${1:-}" = --quick ]; then
  # What is not installed here is found there. The versions of these two are what the oldest of the others ask for.
  python3 -c 'import site, sysconfig; print(sysconfig.get_paths()["purelib"])' > \
    "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
  # shellcheck disable=SC2046
  "$python" -m pip install -q --no-deps $(oldest "${libraries[@]}") "huggingface-hub==0.34.*" "tokenizers==0.22.0"
  "$python" -m pip install -q "httpx<1" "requests"
else
  # shellcheck disable=SC2046
  "$python" -m pip install -q ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    $(oldest "${libraries[@]}" "${heavy[@]}" einops pillow tqdm) hypothesis peft pytest pytest-xdist scikit-image
fi
"$python" -m pip list 2> /dev/null | grep -iE "^(accelerate|diffusers|huggingface|numpy|pillow|safetensors|torch|transf)"

# Away from the checkout's root, on its sources.
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
root=$PWD
cd "$work"
"$python" -m gpstoken_diffusers demo -o demo -q
"$python" -m gpstoken_diffusers generate --label Food -n 1 -q -o food.png
"$python" -W error::FutureWarning - << 'PY'
import torch
from diffusers import DiffusionPipeline

from gpstoken_diffusers.assets import MINI, MINI_PIPELINE

pipe = DiffusionPipeline.from_pretrained(str(MINI_PIPELINE), trust_remote_code=True)
from gpstoken_diffusers import AutoencoderGPSToken, GPSTokenImg2ImgPipeline, GPSTokenPipeline

assert AutoencoderGPSToken.from_pretrained(MINI, dtype=torch.bfloat16).dtype == torch.bfloat16
assert type(pipe) is GPSTokenPipeline and pipe.id2label[3] == "Food & Drink", pipe.id2label
pipe.set_progress_bar_config(disable=True)
pipe("Food", num_inference_steps=2, layout_num_inference_steps=2)
pipe.save_pretrained("saved")
again = GPSTokenPipeline.from_pretrained("saved", dtype=torch.bfloat16)
assert GPSTokenImg2ImgPipeline.from_pipe(again).id2label == pipe.id2label
PY
echo "the main jobs: done"
if [ "${1:-}" != --quick ]; then
  cd "$root"
  "$python" -m pytest -q -m "not slow" tests/models/test_official_checkpoints.py tests/models/test_every_model.py tests/pipelines tests/tokens
fi
