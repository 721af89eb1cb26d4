"""The parts of benchmarks/planted.py, on problems small enough to check by hand."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import planted
from benchmarks.harness import read_json, write_json


def cases() -> list[Any]:
    small = planted.Case(clients=4, prompts=6, dimension=5, noise=0.0)
    changes: list[dict[str, Any]] = [
        {},
        {"probability": 0.5},
        {"smallest": 0.2},
        {"outliers": 2},
        {"duplicates": 3},
        {"probability": 0.5, "outliers": 1, "duplicates": 2, "scale": 100.0},
    ]
    return [dataclasses.replace(small, **change) for change in changes]


# The generator.


def test_without_noise_prompts_equal_the_true_prompts_of_their_labels() -> None:
    for case in cases():
        problem = planted.make_problem(case, 3)
        assert len(problem.prompt_sets) == case.clients
        for prompts, labels in zip(problem.prompt_sets, problem.labels, strict=True):
            true = torch.from_numpy(problem.true_prompts[labels]).float()
            assert torch.equal(prompts, true)
            assert len(set(labels.tolist())) == len(labels)
            assert int((labels >= case.prompts).sum()) >= case.outliers


def test_noise_is_the_ratio_of_noise_to_spread_whatever_the_scale() -> None:
    case = planted.Case(clients=40, prompts=50, dimension=60, noise=0.5, scale=200.0)
    problem = planted.make_problem(case, 0)
    noise = problem.points - problem.true_prompts[problem.flat_labels]
    assert noise.std() == pytest.approx(100, rel=0.01)
    assert problem.true_prompts.std() == pytest.approx(200, rel=0.05)


def test_sizes_of_sets() -> None:
    case = planted.Case(clients=5, prompts=20, smallest=0.2, outliers=1)
    sizes = [len(prompts) for prompts in planted.make_problem(case, 0).prompt_sets]
    assert sizes == [5, 9, 13, 17, 21]
    subsets = planted.make_problem(planted.Case(clients=200, probability=0.6), 0)
    mean = len(subsets.flat_labels) / 200
    assert mean == pytest.approx(12, abs=0.7)


def test_rows_are_shuffled() -> None:
    problem = planted.make_problem(planted.Case(clients=3), 0)
    orders = [tuple(labels) for labels in problem.labels]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(orders)) == 3
    assert tuple(range(20)) not in orders


def test_duplicates_are_two_copies_at_one_client() -> None:
    case = planted.Case(clients=4, prompts=6, dimension=5, noise=0.1, duplicates=6)
    problem = planted.make_problem(case, 1)
    owner = np.repeat(np.arange(4), [len(labels) for labels in problem.labels])
    labels = problem.flat_labels
    assert problem.twins.shape == (6, 2)
    assert sorted(labels[problem.twins[:, 0]]) == list(range(6))
    assert sorted(labels[problem.twins[:, 1]]) == list(range(6, 12))
    for first, second in problem.twins:
        assert owner[first] == owner[second]
        true = problem.true_prompts[labels[[first, second]]]
        assert np.array_equal(true[0], true[1])
        assert not np.array_equal(problem.points[first], problem.points[second])
    assert planted.describe_problem(problem) == {
        "local_prompts": 30,
        "shared": 6,
        "second_copies": 6,
        "outliers": 0,
        "smallest_set": min(len(each) for each in problem.labels),
        "largest_set": max(len(each) for each in problem.labels),
    }


def test_a_seed_fixes_the_problem() -> None:
    for case in cases():
        one, same, other = (planted.make_problem(case, seed) for seed in (0, 0, 1))
        assert np.array_equal(one.points, same.points)
        assert np.array_equal(one.flat_labels, same.flat_labels)
        assert one.points.shape != other.points.shape or not np.array_equal(
            one.points, other.points
        )


def test_impossible_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="either random subsets or unequal sizes"):
        planted.Case(probability=0.5, smallest=0.5)
    with pytest.raises(ValueError, match="21 duplicates of 20 prompts"):
        planted.Case(duplicates=21)


# Metrics.


def by_hand() -> Any:
    """Two clients, true prompts 0 and 10 on a line, local prompts (1, 11) and (9, -1)."""
    return planted.Problem(
        prompt_sets=[torch.tensor([[1.0], [11.0]]), torch.tensor([[9.0], [-1.0]])],
        true_prompts=np.array([[0.0], [10.0]]),
        labels=[np.array([0, 1]), np.array([1, 0])],
        twins=np.zeros((0, 2), dtype=np.int64),
        num_shared=2,
    )


def test_the_true_groups_and_their_means_score_1_0_1() -> None:
    for case in cases():
        problem = planted.make_problem(dataclasses.replace(case, noise=0.3), 2)
        used, assignment = np.unique(problem.flat_labels, return_inverse=True)
        centroids = np.stack(
            [problem.points[problem.flat_labels == label].mean(axis=0) for label in used]
        )
        metrics = planted.score(problem, planted.Answer(assignment, centroids))
        assert (metrics["ari"], metrics["count_error"]) == (1.0, 0.0)
        assert metrics["centroid_ratio"] == pytest.approx(1.0)
        assert metrics.get("copies_apart", 1.0) == 1.0


def test_metrics_by_hand() -> None:
    problem = by_hand()
    # Everything in a cluster of its own: every distance is 1, and the true groups' means are
    # the true prompts, up to the floor of a millionth of the true prompts' RMS length sqrt(50).
    alone = planted.score(problem, planted.Answer(np.arange(4), problem.points))
    assert alone["ari"] == 0.0
    assert alone["count_error"] == 2.0
    assert alone["centroid_ratio"] == pytest.approx(1 / (1e-6 * np.sqrt(50)))
    moved = dataclasses.replace(
        problem, prompt_sets=[torch.tensor([[1.0], [12.0]]), torch.tensor([[10.0], [-1.0]])]
    )
    # Groups' means 0 and 11 miss by 0 and 1: RMS sqrt(1/2). One cluster at 5.5 misses by 5.5
    # and 4.5: RMS sqrt((30.25 + 20.25) / 2).
    one = planted.score(moved, planted.Answer(np.zeros(4, dtype=int), np.array([[5.5]])))
    assert one["ari"] == 0.0
    assert one["count_error"] == -1.0
    assert one["centroid_ratio"] == pytest.approx(np.sqrt(50.5))
    # Pairs as (client 0, row 0) with (client 1, row 0): no true pair is found. Of 6 pairs, 2 are
    # together in either partition, 2 * 2 / 6 expected: (0 - 2/3) / (2 - 2/3) = -1/2.
    wrong = planted.score(problem, planted.Answer(np.array([0, 1, 0, 1]), np.array([[5.0], [5.0]])))
    assert wrong["ari"] == pytest.approx(-0.5)


def test_either_copy_of_a_duplicate_may_be_the_second() -> None:
    """Client 0 returns the prompt at 0 twice; clients 1 and 2 once."""
    problem = planted.Problem(
        prompt_sets=[torch.tensor([[0.1], [-0.1]]), torch.tensor([[0.2]]), torch.tensor([[0.3]])],
        true_prompts=np.array([[0.0], [0.0]]),
        labels=[np.array([0, 1]), np.array([0]), np.array([0])],
        twins=np.array([[0, 1]]),
        num_shared=1,
    )
    assert planted.settle_twins(problem, np.array([0, 1, 0, 0])).tolist() == [0, 1, 0, 0]
    assert planted.settle_twins(problem, np.array([0, 1, 1, 1])).tolist() == [1, 0, 0, 0]
    for first in (0, 1):
        assignment = np.array([first, 1 - first, 1, 1])
        metrics = planted.score(problem, planted.Answer(assignment, np.array([[0.0], [0.0]])))
        assert (metrics["ari"], metrics["count_error"]) == (1.0, 0.0)
        assert metrics["copies_apart"] == 1.0
    together = planted.Answer(np.zeros(4, dtype=int), np.array([[0.125]]))
    metrics = planted.score(problem, together)
    assert (metrics["count_error"], metrics["copies_apart"]) == (-1.0, 0.0)


def test_oracle_is_perfect_without_noise_and_not_in_much() -> None:
    for case in cases():
        problem = planted.make_problem(case, 5)
        metrics = planted.score(problem, planted.ask_oracle(problem, 5))
        assert metrics["ari"] == 1.0
        assert metrics["count_error"] == 0.0
        assert metrics["centroid_ratio"] == 1.0
    noisy = planted.make_problem(planted.Case(dimension=4, noise=3.0), 0)
    assert planted.score(noisy, planted.ask_oracle(noisy, 0))["ari"] < 0.9


def test_genie_is_perfect_without_noise_and_below_the_oracle_in_much() -> None:
    for case in cases():
        problem = planted.make_problem(case, 5)
        metrics = planted.score(problem, planted.ask_genie(problem, 5))
        assert (metrics["ari"], metrics["count_error"]) == (1.0, 0.0)
        assert metrics["centroid_ratio"] == 1.0
    references = {"oracle": 0.0, "genie": 0.0, "map": 0.0}
    for seed in range(5):
        noisy = planted.make_problem(planted.Case(noise=2.0, probability=0.6), seed)
        for method in references:
            answer = planted.METHODS[method](noisy, seed)
            references[method] += planted.score(noisy, answer)["ari"] / 5
    assert references["map"] < references["genie"] < references["oracle"]


def test_genie_by_hand() -> None:
    """Prompts 1 and 2, labels 0 and 1; 3, label 0. True prompts are from N(0, 1), noise too.

    Client 0 is told that prompt 0 is at 3 / 2 with variance 1 / 2, and of prompt 1 nothing. Twice
    the log odds of the true pairing over the other one: -(1 - 1.5)^2 / 1.5 - 2^2 / 2 +
    (2 - 1.5)^2 / 1.5 + 1^2 / 2 = -1.5, so 2 and not 1 is taken for a copy of prompt 0. Client 1 is
    told that the prompts are at 1 / 2 and 2 / 2: its 3 is nearer to the second.
    """
    problem = planted.Problem(
        prompt_sets=[torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])],
        true_prompts=np.zeros((2, 1)),
        labels=[np.array([0, 1]), np.array([0])],
        twins=np.zeros((0, 2), dtype=np.int64),
        num_shared=2,
        noise=1.0,
    )
    answer = planted.ask_genie(problem, 0)
    assert answer.assignment.tolist() == [1, 0, 1]
    assert answer.centroids[:, 0].tolist() == [2.0, 2.0]


def test_the_genie_does_not_depend_on_the_scale() -> None:
    answers = []
    for scale in (1.0, 2.0**10):
        case = planted.Case(noise=1.5, dimension=16, outliers=1, scale=scale)
        problem = planted.make_problem(case, 0)
        answers.append(planted.ask_genie(problem, 0).assignment)
    assert np.array_equal(*answers)


def test_intervals_by_hand() -> None:
    # Standard deviation 1, three values: t(0.975, 2) = 4.30265 over sqrt(3).
    assert planted.interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "ci95": 2.4841}
    assert planted.interval([1.0]) == {"mean": 1.0, "ci95": None}


def test_growth_exponent() -> None:
    assert planted.growth_exponent([10, 100, 1000], [1.0, 100.0, 10000.0]) == 2.0
    assert planted.growth_exponent([10], [1.0]) is None


# Methods.


@pytest.mark.parametrize("method", ["map", "kmeans", "mean", "gmm"])
def test_methods_answer_for_every_local_prompt(method: str) -> None:
    problem = planted.make_problem(planted.Case(clients=5, prompts=4, dimension=16, noise=0.05), 0)
    answer = planted.METHODS[method](problem, 0)
    assert answer.assignment.shape == (20,)
    assert answer.centroids.shape == (int(answer.assignment.max()) + 1, 16)
    if method in ("map", "kmeans"):
        assert planted.score(problem, answer)["ari"] == 1.0


def test_what_cannot_be_asked_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = planted.Sweep("noise", (0.5,))
    unequal = planted.Case(clients=3, prompts=4, dimension=4, smallest=0.5)
    skipped = planted.measure("mean", sweep, unequal, 2)
    assert skipped == {"skipped": "sets of different sizes have no common positions"}
    monkeypatch.setitem(planted.METHODS, "map", planted.ask_aggregator("pfpt", variannt="map"))
    assert "unknown option 'variannt'" in planted.measure("map", sweep, unequal, 2)["skipped"]
    nobody = planted.Case(clients=2, prompts=3, dimension=4, probability=0.0)
    assert planted.measure("kmeans", sweep, nobody, 1)["skipped"].startswith("refused: prompt_sets")
    # 100 clients of 20 prompts in 64 dimensions: 2000 * 2000 * 64.
    large = planted.measure("paper", sweep, planted.Case(clients=100), 2)["skipped"]
    assert large == "too large: N * candidates * d = 2.6e+08 > 1e+08"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(problem: Any, seed: int) -> None:
        if len(problem.prompt_sets) == 10:
            np.ones(50 * 2**17)

    monkeypatch.setitem(planted.METHODS, "map", ask)
    problem = planted.make_problem(planted.Case(dimension=2), 0)
    assert planted.peak_memory("map", problem) == pytest.approx(50, abs=5)


# The file of results.


def run(methods: list[str], name: str, seeds: int = 2) -> dict[str, Any]:
    base = planted.Case(clients=3, prompts=4, dimension=8)
    sweep = planted.Sweep("noise", (0.1, 0.5), base)
    swept = planted.run_sweep(sweep, methods, seeds, name, "noise_full")
    return {"runs": {name: {"command": name}}, "sweeps": {"noise_full": swept}}


def test_a_sweep_is_reproducible_and_valid_json(tmp_path: Path) -> None:
    results = [run(["oracle", "map", "kmeans", "mean"], "one") for _ in range(2)]
    for result in results:
        for case in result["sweeps"]["noise_full"]["cases"]:
            for figures in case["methods"].values():
                assert figures.pop("seconds")["mean"] > 0
    assert results[0] == results[1]
    path = tmp_path / "folder" / "planted.json"
    write_json(path, planted.merge({}, results[0]))
    assert read_json(path)["sweeps"] == results[0]["sweeps"]
    [first, _] = results[0]["sweeps"]["noise_full"]["cases"]
    assert first["value"] == 0.1
    assert first["settings"]["noise"] == 0.1
    oracle = first["methods"]["oracle"]
    assert oracle["seeds"] == 2
    assert oracle["ari"] == {"mean": 1.0, "ci95": 0.0}
    assert oracle["exact_count"] == 1.0
    assert read_json(tmp_path / "absent.json") == {}


def test_results_are_merged_method_by_method() -> None:
    first = planted.merge({}, run(["oracle", "mean"], "one"))
    speed = {**first, "speed": {"map": [], "run": "one"}}
    second = planted.merge(speed, run(["oracle"], "two", seeds=3))
    [case, _] = second["sweeps"]["noise_full"]["cases"]
    assert list(case["methods"]) == ["mean", "oracle"]
    assert (case["methods"]["oracle"]["seeds"], case["methods"]["oracle"]["run"]) == (3, "two")
    assert (case["methods"]["mean"]["seeds"], case["methods"]["mean"]["run"]) == (2, "one")
    assert list(second["runs"]) == ["one", "two"]
    assert second["speed"]["run"] == "one"
    # All that was measured in run `one` is measured anew, so nothing refers to it.
    third = planted.merge(first, run(["oracle", "mean"], "three"))
    assert list(third["runs"]) == ["three"]
    # Another base case: figures of the old one do not mix with it.
    other = run(["oracle"], "four")
    for each in other["sweeps"]["noise_full"]["cases"]:
        each["settings"]["prompts"] = 5
    assert list(planted.merge(first, other)["sweeps"]["noise_full"]["cases"][0]["methods"]) == [
        "oracle"
    ]


def test_the_command_writes_json_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = planted.Case(clients=3, prompts=4, dimension=8)
    for name in ("noise_full", "clients"):
        values = (0.1, 0.5) if name == "noise_full" else (2, 3)
        sweep = planted.Sweep(planted.SWEEPS[name].varies, values, small)
        monkeypatch.setitem(planted.SWEEPS, name, sweep)
    output, figure = tmp_path / "planted.json", tmp_path / "images" / "planted.png"
    command = ["planted.py", "--seeds", "2", "--methods", "map,oracle", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--sweeps", "noise_full"])
    planted.main()
    assert list(json.loads(output.read_text())["sweeps"]) == ["noise_full"]
    monkeypatch.setattr(sys, "argv", [*command, "--sweeps", "clients", "--figure", str(figure)])
    planted.main()
    result = json.loads(output.read_text())
    assert list(result["sweeps"]) == ["noise_full", "clients"]
    [*runs] = result["runs"].values()
    assert runs[-1]["command"].startswith("python planted.py --seeds 2")
    assert {"cpu", "packages", "date", "git"} <= set(runs[-1])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_every_sweep_is_well_formed() -> None:
    for sweep in planted.SWEEPS.values():
        for value, case in zip(sweep.values, sweep.cases(), strict=True):
            assert getattr(case, sweep.varies) == value


def test_unknown_names_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["planted.py", "--sweeps", "nois"])
    with pytest.raises(SystemExit):
        planted.main()
    assert "unknown 'nois': choose of noise_full" in capsys.readouterr().err
