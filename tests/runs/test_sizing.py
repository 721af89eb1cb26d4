"""What is counted before a run, against what a run counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from fedprompt.client.worker import ClientWorker
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.types import RoundReport, ServerState
from fedprompt.data.prefix.cache import cache_entries, cache_folder
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.runs.outline import Outline, outline
from fedprompt.runs.sizing import Deployment, Traffic, count_traffic, rows_of, sample
from fedprompt.runtime.serial import SerialRuntime
from fedprompt.server.figures import Evaluation
from fedprompt.server.round import run_rounds

Overrides = Callable[..., list[str]]

QUICK = ("clients.batch_size=64", "prompts.depth=4", "prompts.pool=3")
OUTLINES: dict[object, Outline] = {}
FEDERATIONS: dict[object, Federation] = {}


def counted(config: ExperimentConfig) -> tuple[Traffic, Deployment | None]:
    """Before a run; the outline serves all tests."""
    key = (config.data, config.prompts.depth)
    if key not in OUTLINES:
        OUTLINES[key] = outline(config)
    federation = OUTLINES[key].federation
    worker = ClientWorker(federation.setup)
    return count_traffic(config, federation, sample(config, federation, worker))


def happened(config: ExperimentConfig) -> list[RoundReport]:
    """A run, without its evaluation and its files."""
    key = (config.data, config.prompts.depth)
    if key not in FEDERATIONS:
        FEDERATIONS[key] = prepare(config)
    federation = FEDERATIONS[key]
    runtime = SerialRuntime(config.runtime)
    runtime.open(federation.setup)

    def unmeasured(state: ServerState) -> Callable[[], tuple[Evaluation, Evaluation]]:
        return lambda: (Evaluation(), Evaluation())

    state, settings = initial_state(config, federation), settings_of(config, federation)
    rounds = run_rounds(state, settings, runtime, config.build_aggregator(), unmeasured)
    return [report for _, report in rounds]


NO_POOL = "prompts.pool=null"
EXACT = {
    "keys, discriminants and the spread of queries": (
        *("method=fedavg_pt_plus", "prompts.whiten=clients", "rounds=3"),
    ),
    "control variates": ("method=scaffold_pt", NO_POOL),
    "class sums alone": ("method=fedcof", NO_POOL, "prompts.count=0"),
    "class sums before the first round": (
        *("method=head_only", "head=linear", "head.bias=false", "head.start=ridge"),
        *(NO_POOL, "prompts.count=0"),
    ),
    "layers inside the backbone": ("method=lora_fedavg", NO_POOL, "prompts.count=0"),
    "nothing": ("method=local_only", NO_POOL),
    "prompts of a generator": ("method=pfedpg", NO_POOL),
    "all data at one place": ("method=centralised", NO_POOL, "clients.per_round=1"),
}


@pytest.mark.parametrize("what", EXACT)
def test_bytes_are_those_of_the_run(what: str, tiny: Overrides) -> None:
    config = compose("digits", tiny(*QUICK, *EXACT[what]))
    traffic, deployment = counted(config)
    reports = happened(config)
    assert traffic.run_up.exact and traffic.run_down.exact
    assert traffic.run_up.start == sum(each.bytes_up for each in reports)
    assert traffic.run_down.start == sum(each.bytes_down for each in reports)
    assert deployment is None


@pytest.mark.parametrize("method", ["pfpt", "pfpt_plus"])
def test_where_the_server_decides_bytes_have_bounds(method: str, tiny: Overrides) -> None:
    config = compose("digits", tiny(*QUICK, f"method={method}", "rounds=3"))
    traffic, _ = counted(config)
    reports = happened(config)
    assert not traffic.run_down.exact
    # The first round is that of the pool as it begins, whatever happens later.
    assert reports[0].bytes_down == 3 * traffic.client_down.start
    for counts, sent in (
        (traffic.run_up, [each.bytes_up for each in reports]),
        (traffic.run_down, [each.bytes_down for each in reports]),
    ):
        assert counts.low <= sum(sent)
        assert counts.high is None or sum(sent) <= counts.high


def test_bounds_by_pencil(tiny: Overrides) -> None:
    """Three clients send 2 prompts each, so that a pool of 3 has at most 9 and 15 prompts in the
    second and third round; with a bound of 10, 9 and 10.
    """
    config = compose("digits", tiny(*QUICK, "rounds=3"))
    counted(config)
    federation = OUTLINES[config.data, 4].federation
    taken = sample(config, federation, ClientWorker(federation.setup))
    rows = rows_of(config, taken)
    assert [rows.most(each) for each in (1, 2, 3)] == [3, 9, 15]
    assert (rows.least, rows.used) == (1, (1, 2))
    config = compose("digits", tiny(*QUICK, "rounds=3", "aggregator.max_prompts=10"))
    assert [rows_of(config, taken).most(each) for each in (1, 2, 3)] == [3, 9, 10]
    config = compose("digits", tiny(*QUICK, "method=pfpt_plus"))
    assert rows_of(config, taken).most(3) is None


def test_the_hours_of_a_deployment_are_those_of_the_run(tiny: Overrides) -> None:
    devices = (
        *("system.speed=lognormal:1:0.5", "system.bandwidth=uniform:0.5:5"),
        *("system.dropout=0.3", "system.deadline=8", "system.over_select=1.67"),
        "system.empty=skip",
    )
    method = ("method=fedavg_pt_plus", "prompts.whiten=clients", "rounds=4")
    config = compose("digits", tiny(*QUICK, *method, *devices))
    traffic, deployment = counted(config)
    reports = happened(config)
    assert deployment is not None
    assert list(deployment.seconds) == [each.virtual_seconds for each in reports]
    assert deployment.hours == pytest.approx(reports[-1].virtual_hours)
    assert deployment.merged == sum(len(each.clients) for each in reports)
    missed = [each for report in reports for each in report.missed]
    assert [dataclasses.asdict(each) for each in deployment.missed] == missed
    assert {each["why"] for each in missed} >= {"dropped"}
    assert traffic.run_up.start == sum(each.bytes_up for each in reports)
    assert traffic.run_down.start == sum(each.bytes_down for each in reports)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_as_large_as_is_said(dtype: str, tiny: Overrides, tmp_path: object) -> None:
    """Within 25 % was asked; the files' headers are all that is left out."""
    more = ("data=domains", "data.train=60", "data.validation=40", "data.test=40")
    more = (*more, "data.public=60", "head=frozen", "clients.batch_size=64", "model=nano")
    more = (*more, f"cache.folder={tmp_path}", f"cache.dtype={dtype}", "prompts.depth=1")
    config = compose("digits", tiny(*more))
    expected = outline(config).cache_bytes
    assert cache_entries(cache_folder(str(tmp_path))) == []  # nothing was written
    prepare(config)
    on_disk = sum(entry.size for entry in cache_entries(cache_folder(str(tmp_path))))
    assert expected <= on_disk <= 1.25 * expected
