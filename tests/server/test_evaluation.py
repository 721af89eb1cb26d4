"""Figures over classes and clients, and each client's share of a held-out split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fedprompt
from fedprompt.cli.main import main
from fedprompt.config import list_methods
from fedprompt.data.partition.mirror import mirror_partition
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import comparison_table
from fedprompt.server.figures import ClientFigures, describe

Overrides = Callable[..., list[str]]


def test_shares_of_a_held_out_split_are_those_of_the_training_split() -> None:
    """Two domains, two classes; the clients' training samples by (domain, class):

    client 0: (0, 0) 3, (0, 1) 1;  client 1: (0, 0) 1, (1, 1) 2;  client 2: (1, 1) 6
    """
    cells = [(0, 0)] * 3 + [(0, 1)] + [(0, 0)] + [(1, 1)] * 2 + [(1, 1)] * 6
    groups, labels = np.array(cells).T
    parts = [np.arange(4), np.arange(4, 7), np.arange(7, 13)]
    held = [(0, 0)] * 8 + [(0, 1)] * 2 + [(1, 1)] * 6 + [(1, 0)] * 5  # nobody trains on (1, 0)
    held_groups, held_labels = np.array(held).T
    shares = mirror_partition(parts, labels, groups, held_labels, held_groups)

    def count(client: int, group: int, label: int) -> int:
        own = shares[client]
        return int(((held_groups[own] == group) & (held_labels[own] == label)).sum())

    assert [count(client, 0, 0) for client in range(3)] == [6, 2, 0]
    assert [count(client, 0, 1) for client in range(3)] == [2, 0, 0]
    # 6 images by 2 : 6 is 1.5 : 4.5; the larger remainders are equal, so the first gets it.
    assert [count(client, 1, 1) for client in range(3)] == [0, 2, 4]
    everything = np.concatenate(shares)
    assert len(np.unique(everything)) == len(everything) == 16
    assert all((np.diff(own) > 0).all() for own in shares)
    again = mirror_partition(parts, labels, groups, held_labels, held_groups)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


def test_figures_over_clients_by_hand() -> None:
    figures = describe([0.2, 0.4, 0.6, 0.8])
    assert figures["mean"] == pytest.approx(0.5)
    assert figures["deviation"] == pytest.approx(np.sqrt(0.05))
    assert figures["worst_tenth"] == pytest.approx(0.2)
    assert figures["jain"] == pytest.approx(2.0**2 / (4 * 1.2))
    twenty = describe([i / 20 for i in range(20)])
    assert twenty["worst_tenth"] == pytest.approx((0 + 1 / 20) / 2)
    assert np.isnan(describe([])["mean"])
    summary = ClientFigures({7: 1.0, 3: 0.0}).summary()
    assert (summary["clients"], summary["by_client"]) == (2, {"3": 0.0, "7": 1.0})


def test_clients_shares_make_up_the_pooled_accuracy(tiny: Overrides) -> None:
    """With one model for all, the clients' correct images add up to the pooled ones; and class
    accuracies to the balanced one.
    """
    result = fedprompt.run("digits", tiny("method=head_only", "prompts.count=0", "rounds=1"))
    [report] = result.reports
    own = report["personalised"]["test"]
    partition = RunDirectory.open(result.run_dir).read_indices()
    assert own["clients"] <= len(partition) == 6
    from fedprompt.config import compose
    from fedprompt.runs.federation import prepare

    federation = prepare(compose(result.run_dir / "config.yaml"))
    table, test = federation.data.table, federation.setup.splits[0]
    shares = mirror_partition(partition, table.labels, table.groups, test.labels, test.groups)
    correct = sum(own["by_client"][str(c)] * len(share) for c, share in enumerate(shares))
    assert correct / len(test) == pytest.approx(report["accuracy"], abs=1e-6)
    assert report["balanced_accuracy"] == pytest.approx(np.mean(report["class_accuracy"]))
    counts = np.bincount(test.labels)
    pooled = (np.array(report["class_accuracy"]) * counts).sum() / counts.sum()
    assert pooled == pytest.approx(report["accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("when", "expected"), [("last", [False, True]), ("every", [True, True]), ("never", [False] * 2)]
)
def test_when_clients_are_measured(tiny: Overrides, when: str, expected: list[bool]) -> None:
    overrides = tiny("method=head_only", "prompts.count=0", f"eval_clients={when}")
    reports = fedprompt.run("digits", overrides).reports
    assert [bool(report["personalised"]) for report in reports] == expected


@pytest.mark.parametrize(
    ("when", "expected"), [("last", [False, True]), ("every", [True, True]), ("never", [False] * 2)]
)
def test_when_images_alone_are_measured(tiny: Overrides, when: str, expected: list[bool]) -> None:
    reports = fedprompt.run("digits", tiny(f"eval_alone={when}")).reports
    for split in ("alone_accuracy", "alone_validation_accuracy"):
        assert [report[split] is not None for report in reports] == expected


def test_images_alone_are_measured_as_with_an_eval_batch_of_one(
    tiny: Overrides, tmp_path: Path
) -> None:
    keyed = tiny("prompts.selection=keyed", "prompts.pool=12", "prompts.init_std=1")
    together = fedprompt.run("digits", keyed)
    again = [*keyed, "prompts.eval_batch=1", f"run_dir={tmp_path / 'alone'}"]
    alone = fedprompt.run("digits", again)
    assert together.summary["state_sha256"] == alone.summary["state_sha256"]
    losses = [result.reports[-1]["loss"] for result in (together, alone)]
    assert losses[0] != losses[1]  # images have other prompts
    for name in ("accuracy", "validation_accuracy"):
        expected = alone.reports[-1][name]
        assert together.reports[-1][f"alone_{name}"] == expected
        assert alone.reports[-1][f"alone_{name}"] == expected
    assert together.summary["alone_accuracy"] == alone.summary["accuracy"]


def test_images_that_select_nothing_are_always_alone(tiny: Overrides) -> None:
    result = fedprompt.run("digits", tiny("method=fedavg_pt", "rounds=1"))
    assert result.summary["alone_accuracy"] == result.summary["accuracy"]


def test_where_there_is_no_global_model_none_is_measured_alone(tiny: Overrides) -> None:
    result = fedprompt.run("digits", tiny("method=local_only", "rounds=1"))
    assert result.summary["alone_accuracy"] is None


def test_a_method_without_a_global_model_has_the_clients_figures(tiny: Overrides) -> None:
    result = fedprompt.run("digits", tiny("method=local_only"))
    [row] = comparison_table([result.run_dir])
    means = [report["personalised"]["validation"]["mean"] for report in result.reports]
    tests = [report["personalised"]["test"]["mean"] for report in result.reports]
    assert row["accuracy"] is None
    assert row["best_round"] == 1 + int(np.argmax(means))
    assert row["best_accuracy"] == tests[row["best_round"] - 1]
    assert row["personalised"]["mean"] == tests[-1]
    page = (result.run_dir / "report.html").read_text(encoding="utf-8")
    assert "worst tenth" in page
    summary = json.loads((Path(result.run_dir) / "summary.json").read_text())
    assert summary["personalised"]["mean"] == tests[-1]
    assert summary["state"] == "finished"


def test_methods_are_listed_with_their_sources() -> None:
    result = CliRunner().invoke(main, ["methods"])
    assert result.exit_code == 0
    for card in list_methods():
        assert f"{card.name}\n    {card.text}\n    {card.source}\n" in result.output
    assert "pfedpg" in result.output
    assert "ICCV 2023" in result.output
