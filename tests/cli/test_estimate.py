"""`fedprompt estimate` and `run --dry-run`: what they say, what they leave alone, bad calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fedprompt.cli import estimate as module
from fedprompt.cli.main import main
from fedprompt.config import compose
from fedprompt.data.prefix.cache import cache_folder

Overrides = Callable[..., list[str]]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="fedprompt")


def test_it_says_what_a_run_takes_and_writes_nothing(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path / "cache"))
    overrides = tiny("compare=[head_only]", "prompts.depth=4", "system.bandwidth=8")
    shown = call("run", "digits", *overrides, "--dry-run")
    assert shown.exit_code == 0, shown.output
    for line in ("features: ", "on this machine", "on the clients", "pfpt: ~ with the prompts"):
        assert line in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    tree = json.loads(call("estimate", "digits", *overrides, "--json").stdout)
    assert [each["name"] for each in tree["methods"]] == ["pfpt", "head_only"]
    own, head = tree["methods"]
    # A head of 10 classes on 128 features, its hidden layer and biases, four bytes a number.
    assert head["traffic"]["client_up"]["low"] == head["traffic"]["client_up"]["high"]
    # 3 clients and 2 rounds; 10^6 bytes a second in each direction.
    sent = head["traffic"]["client_up"]["start"] + head["traffic"]["client_down"]["start"]
    assert head["deployment"]["seconds"] == pytest.approx([sent / 1e6] * 2)
    assert head["deployment"]["hours"] == pytest.approx(2 * sent / 1e6 / 3600)
    assert own["memory"]["total"] > own["memory"]["process"] > 10**8
    assert own["round_seconds"] > 0
    assert tree["hours"] > own["hours"] + head["hours"]
    assert list(tmp_path.iterdir()) == []
    assert not cache_folder(None).exists()


def test_a_given_speed_makes_seconds_of_operations(tiny: Overrides) -> None:
    """Twice the speed takes half the time but for the server's own."""
    overrides = tiny("method=fedavg_pt", "prompts.depth=4")
    slow, fast = (
        module.make_estimate(compose("digits", overrides), gflops) for gflops in (1e-3, 2e-3)
    )
    assert slow.methods[0].hours / fast.methods[0].hours == pytest.approx(2, rel=0.01)
    assert slow.cache_seconds / fast.cache_seconds == pytest.approx(2)


def test_work_is_dealt_to_who_is_free_first() -> None:
    """3, 1, 1, 2, 4 seconds by two: one does 3 and 4, the other 1, 1 and 2."""
    assert module.makespan(iter([3.0, 1.0, 1.0, 2.0, 4.0]), 2) == 7
    assert module.makespan(iter([3.0, 1.0]), 1) == 4
    assert module.makespan(iter([]), 3) == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["estimate"], "expected one experiment name or file"),
        (["estimate", "digits", "system.speed=0"], "system.speed: expected a finite number >"),
        (["estimate", "digits", "system.bandwidth=-3"], "system.bandwidth: expected a finite"),
        (["estimate", "digits", "system.speed=nowhere.txt"], "system.speed: expected a number"),
        (["estimate", "digits", "system.sped=1"], "unknown config key 'system.sped'"),
        (["estimate", "digits", "speed=1"], "did you mean 'system.speed'?"),
        (["estimate", "digits", "--gflops", "0"], "0 is not in the range x>0"),
        (
            ["estimate", "digits", "system.speed=1", "system.deadline=0.01"],
            "round 1: expected at least one of 10 clients to report within system.deadline=0.01",
        ),
    ],
)
def test_bad_calls_are_one_line(arguments: list[str], line: str) -> None:
    result = call(*arguments)
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert line in result.stderr
    assert result.stdout == ""
