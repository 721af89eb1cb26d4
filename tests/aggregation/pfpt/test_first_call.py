"""The first aggregation of a run waits for no import."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import torch
from fedprompt import aggregation

built = [aggregation.create(name) for name in ("mean", "random", "server_opt", "pfpt")]
before = set(sys.modules)
generator = torch.Generator().manual_seed(0)
sets = [torch.randn(3, 8, generator=generator) for _ in range(4)]  # noise: the search is annealed
rows = [torch.arange(3)] * 4
for aggregator in built:
    aggregator.aggregate(sets, origins=rows, previous=sets[0], keys=sets, previous_keys=sets[1])
print(sorted(set(sys.modules) - before))
"""


def test_building_an_aggregator_imports_what_its_first_call_needs() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
