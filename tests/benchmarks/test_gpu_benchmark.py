"""benchmarks/speed/gpu.py without a GPU and without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import contextlib, sys
sys.modules["ray"] = None  # importing it raises ImportError
sys.path.insert(0, "tests")
from benchmarks.speed.gpu import main
from simulated_gpu import simulated_gpu

tiny = ["--dry", "--rounds", "1", "--epochs", "1", "--clients", "12"]
tiny += ["--train", "144", "--test", "32", "--backbone", "test_vit", "--device", "cuda"]
for arguments in (["--help"], tiny):
    sys.argv = ["gpu", *arguments]
    with contextlib.suppress(SystemExit):
        main()
with simulated_gpu():
    main()
"""


def test_it_runs_on_a_simulated_gpu_without_ray() -> None:
    """Its options are read, a missing GPU is said, and the cohort of ten goes in one pack."""
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--rival" in done.stdout
    assert "error: --device cuda: no CUDA device was found; try" in done.stderr
    result = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert (result["card"], result["rounds"], result["packs_of"]) == ("simulated", 1, [10])
