"""benchmarks/depth.py: the arithmetic is what autograd keeps, and the page is of the results."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import depth as benchmark
from benchmarks import depth_page
from benchmarks.harness import DOCS, put_between, read_json
from fedprompt.cli.bench import step_flops


@pytest.mark.parametrize("cut", [0, 2, 4])
def test_the_arithmetic_by_hand_is_what_autograd_keeps(cut: int) -> None:
    """A nano ViT: d = 128, 4 heads, 17 tokens and 3 prompts, 5 blocks; 2 images."""
    backbone = benchmark.network_of("nano", 32, cut)
    tokens = 2 * (17 + 3)
    block = tokens * (10 * 128 + 4 + 4)
    last = tokens * (3 * 128 + 2) + 2 * (3 * 128 + 2 + 4 + 4 * 128)
    expected = 4 * ((4 - cut) * block + last + 2 * (128 + 2))
    assert benchmark.kept_bytes(backbone, 2, 20) == expected
    prompts = torch.randn(3, 128).requires_grad_()
    counted = benchmark.counted_bytes(backbone, torch.randn(2, 17, 128), prompts)
    assert counted == pytest.approx(expected, rel=1e-3)


def test_operations_fall_by_the_same_amount_with_every_block() -> None:
    """12 d^2 weights of a block, forward and back; attention once more back."""
    flops = [step_flops(benchmark.network_of("nano", 32, cut), 2, 20) for cut in range(5)]
    block = 2 * (2 * 2 * 12 * 128**2 * 20 + 3 * 4 * 128 * 20 * 20)
    assert [first - second for first, second in itertools.pairwise(flops)] == [block] * 4


def test_what_is_measured_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.NETWORKS, "nano", ("nano", 32, (0,), 2))
    whole = benchmark.fresh_step("nano", 0)
    assert whole["arithmetic_mb"] == pytest.approx(whole["kept_mb"], rel=1e-3)
    assert whole["peak_mb"] > whole["kept_mb"] > 1
    assert whole["milliseconds"] > 0


def test_the_page_shows_the_committed_results(tmp_path: Path) -> None:
    page, committed = tmp_path / "depth.md", (DOCS / "depth.md").read_text(encoding="utf-8")
    page.write_text(committed, encoding="utf-8")
    cases = read_json(benchmark.RESULT)["cases"]
    for name, text in depth_page.tables(cases).items():
        put_between(page, name, text)
    assert page.read_text(encoding="utf-8") == committed, "python -m benchmarks.depth_page"
    for name in (case for case in benchmark.cases(["domains"]) if case.startswith("step/")):
        assert cases[name]["kept_mb"] == pytest.approx(cases[name]["arithmetic_mb"], rel=1e-3)
