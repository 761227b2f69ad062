"""`python -m gpstoken_diffusers.benchmark` from a checkout: runs tests/benchmarks/benchmark_models.py."""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    script = Path(__file__).resolve().parents[1] / "tests" / "benchmarks" / "benchmark_models.py"
    sys.exit(
        subprocess.call([sys.executable, str(script), *sys.argv[1:]])
        if script.is_file()
        else "benchmark: the benchmarks are in the repository, not in the installed package: run this in a checkout."
    )
