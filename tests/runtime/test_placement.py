"""How many client actors fit where: numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from fedprompt.core.errors import ConfigError
from fedprompt.runtime import RuntimeOptions
from fedprompt.runtime.placement import ActorPlan, Node, largest_share, plan_actors, slots


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are for a cluster, whatever this machine has."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("options", "nodes", "expected"),
    [
        # One for each core of each node.
        ({}, [Node(2), Node(3)], ActorPlan(5, 1.0, 0.0)),
        # Two threads: the third core of the second node is left over.
        ({"threads": 2}, [Node(2), Node(3)], ActorPlan(2, 2.0, 0.0)),
        ({"actors": 2}, [Node(1), Node(1)], ActorPlan(2, 1.0, 0.0)),
        # Four on two cores: half a core each.
        ({"actors": 4}, [Node(2)], ActorPlan(4, 0.5, 0.0)),
        # On nodes of 2 and 1 the largest equal share of four is 2/3: three there, one here.
        ({"actors": 4}, [Node(2), Node(1)], ActorPlan(4, 0.6666, 0.0)),
        ({"cpus": 1}, [Node(4)], ActorPlan(1, 1.0, 0.0)),
    ],
)
def test_cpus(options: dict, nodes: list[Node], expected: ActorPlan) -> None:
    assert plan_actors(RuntimeOptions(**options), nodes) == expected


@pytest.mark.parametrize(
    ("share", "gpus", "expected"),
    [
        (0.5, [2], 4),
        (0.4, [2], 4),  # 0.2 of each GPU stay free: an actor lies on one GPU
        (0.1, [1], 10),
        (1 / 3, [1, 1], 6),
        (1, [2, 1], 3),
        (2, [3, 1], 1),
    ],
)
def test_gpu_slots(share: float, gpus: list[int], expected: int) -> None:
    assert slots([Node(16, each) for each in gpus], 1, share) == expected


def test_cpu_and_gpu_are_on_the_same_node() -> None:
    """Two halves of the one GPU need its node's CPU: half of it each, though others are idle."""
    options = RuntimeOptions(gpus_per_actor=0.5, actors=2)
    nodes = [Node(1), Node(1), Node(1, gpus=1)]
    assert plan_actors(options, nodes) == ActorPlan(2, 0.5, 0.5)
    assert plan_actors(RuntimeOptions(gpus_per_actor=0.5), nodes) == ActorPlan(1, 1.0, 0.5)


def test_the_driver_takes_a_share_of_a_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four quarters: the driver has one, so that three actors fit and a fourth does not."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    node = [Node(8, gpus=1)]
    assert plan_actors(RuntimeOptions(gpus_per_actor=0.25), node) == ActorPlan(3, 1.0, 0.25)
    with pytest.raises(ConfigError, match=r"4 actors of 0.25 GPU .* which hold 3"):
        plan_actors(RuntimeOptions(gpus_per_actor=0.25, actors=4), node)
    # Shared evenly: seven actors and the driver on two GPUs are four on each.
    assert plan_actors(RuntimeOptions(actors=7), [Node(8, gpus=2)]) == ActorPlan(7, 1.0, 0.25)
    # The bundles of a trial's group: its driver has no CPU.
    group = [Node(0, 0.25), Node(1, 0.25), Node(1, 0.25)]
    options = RuntimeOptions(gpus_per_actor=0.25, actors=2)
    assert plan_actors(options, group) == ActorPlan(2, 1.0, 0.25)


def test_gpus_bound_the_number_of_actors() -> None:
    options = RuntimeOptions(gpus_per_actor=0.5)
    assert plan_actors(options, [Node(8, gpus=1)]) == ActorPlan(2, 1.0, 0.5)


@pytest.mark.parametrize(
    ("options", "nodes", "message"),
    [
        (
            {"actors": 3, "gpus_per_actor": 0.5},
            [Node(8, gpus=1)],
            r"3 actors of 0.5 GPU do not fit in the 1 GPUs that Ray has, which hold 2",
        ),
        ({"actors": 1, "gpus_per_actor": 2}, [Node(8, 1), Node(8, 1)], "2 GPUs .* which hold 0"),
        ({"actors": 17}, [Node(2)], "17 actors do not fit in the 2 CPUs .* at most 16 actors"),
        # Two nodes of one core hold no worker of two threads.
        ({"threads": 2}, [Node(1), Node(1)], "2 threads per worker do not fit in the 1 CPU "),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(
    options: dict, nodes: list[Node], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_actors(RuntimeOptions(**options), nodes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus_per_actor": 1.5}, "a fraction of one GPU or whole GPUs, got 1.5"),
        ({"gpus_per_actor": -1}, "got -1"),
    ],
)
def test_wrong_gpu_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeOptions(**options)


def test_no_gpu_per_actor_means_the_cpu() -> None:
    assert RuntimeOptions(gpus_per_actor=0).torch_device == "cpu"


def test_equal_shares() -> None:
    assert largest_share([Node(4)], 2) == 2.0
    assert largest_share([Node(3)], 2) == 1.0  # whole CPUs where there is at least one
    assert largest_share([Node(1), Node(1)], 3) == 0.5
    assert largest_share([], 1) == 0.0
