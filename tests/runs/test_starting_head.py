"""A head that closed-form sums of all clients start: that of a run of FedCOF, FedNCM or Fed3R."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedprompt
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.runs.federation import initial_state, prepare

Overrides = Callable[..., list[str]]
LINEAR = "head={name: linear, bias: false}"


@pytest.mark.parametrize("rule", ["ncm", "cof", "ridge"])
def test_it_is_the_head_of_a_closed_form_run(tiny: Overrides, tmp_path: Path, rule: str) -> None:
    closed = (
        "method=fedcof",
        f"objective.rule={rule}",
        "rounds=1",
        "clients.per_round=null",
        "prompts.count=0",
    )
    ended = fedprompt.run("digits", tiny(*closed))
    config = compose("digits", tiny(LINEAR, f"head.start={rule}"))
    state = initial_state(config, prepare(config))
    assert torch.equal(state.shared.head["0.weight"], ended.state.shared.head["0.weight"])

    own = f"run_dir={tmp_path / 'own'}"
    drawn = fedprompt.run("digits", tiny(LINEAR, own))
    started = fedprompt.run(
        "digits", tiny(LINEAR, f"head.start={rule}", f"run_dir={tmp_path / 'started'}")
    )
    more = [
        there["bytes_up"] - here["bytes_up"]
        for there, here in zip(started.reports, drawn.reports, strict=True)
    ]
    assert more == [ended.reports[0]["bytes_up"], 0]
    assert started.summary["state_sha256"] != drawn.summary["state_sha256"]

    solved = fedprompt.run(
        "digits", tiny(*closed, f"head.start={rule}", f"run_dir={tmp_path / 'solved'}")
    )
    assert solved.summary["state_sha256"] == ended.summary["state_sha256"]
    assert solved.reports[0]["bytes_up"] == ended.reports[0]["bytes_up"], "sums were sent twice"


def test_a_head_that_no_rule_gives_is_refused(tiny: Overrides) -> None:
    with pytest.raises(ConfigError, match=r"head.name=linear, head.bias=false .* got 'released'"):
        compose("digits", tiny("head.start=cof"))
    with pytest.raises(ConfigError, match="got 'linear', false and 'frozen'"):
        compose("domains", ["head={name: linear, bias: false, mode: frozen, start: cof}"])
    with pytest.raises(ConfigError, match="did you mean 'cof'"):
        compose("digits", tiny(LINEAR, "head.start=cov"))
