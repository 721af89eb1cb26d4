"""Losses of objectives: label smoothing on paper, MOON against a loop, and both in whole runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedprompt.client.worker import ClientWorker
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.core.plugins import load_plugins
from fedprompt.core.types import Parts
from fedprompt.experiment import execute, plan_resume, plan_run
from fedprompt.objectives import LossContext, Objective, Seen, Teacher, objectives
from fedprompt.runs.driver import settings_of
from fedprompt.runs.events import RoundFinished
from fedprompt.runs.federation import initial_state, prepare
from fedprompt.server.round import make_jobs

Overrides = Callable[..., list[str]]
NOTHING = LossContext(None, torch.empty(0), {}, {}, {})


def loss_of(
    objective: Objective, logits: Tensor, labels: list[int], seen: dict[str, Tensor] | None = None
) -> Tensor:
    """The loss of features that are the logits."""
    teachers = {name: Seen(value, value) for name, value in (seen or {}).items()}
    context = LossContext(None, torch.zeros(len(labels)), teachers, {}, {})
    return objective.loss(logits, torch.tensor(labels), logits, context)


def test_smoothed_labels_on_paper() -> None:
    """p = (3/4, 1/4) of the two classes of the image's domain, smoothing 0.2:

    -(0.8 + 0.1) log 3/4 - 0.1 log 1/4
    """
    logits = torch.tensor([[math.log(3), 0.0, -torch.inf]], requires_grad=True)
    loss = loss_of(objectives.create("label_smoothing", smoothing=0.2), logits, [0])
    assert loss.item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))
    loss.backward()
    # Softmax less the smoothed label; a class that is not there has no gradient.
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.75 - 0.9, 0.25 - 0.1, 0.0]]))


def test_smoothing_is_that_of_torch_where_all_classes_are_there() -> None:
    logits, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), [0, 3, 2, 2, 1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.3)
    actual = loss_of(objectives.create("label_smoothing", smoothing=0.3), logits, labels)
    torch.testing.assert_close(actual, expected)


def moon_by_hand(z: list[float], near: list[float], far: list[float], temperature: float) -> float:
    """Eq. 3 of arXiv 2103.16257 for one image, in plain Python."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.hypot(*a) / math.hypot(*b)

    positive = math.exp(cosine(z, near) / temperature)
    return -math.log(positive / (positive + math.exp(cosine(z, far) / temperature)))


def test_moon_s_contrast_by_hand() -> None:
    z, near, far = (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
    )
    moon = objectives.create("moon", mu=2.0, temperature=0.3)
    actual = loss_of(moon, z, [0, 1, 2], {"global": near, "previous": far})
    plain = loss_of(objectives.create("plain"), z, [0, 1, 2])
    rows = zip(z.tolist(), near.tolist(), far.tolist(), strict=True)
    contrast = sum(moon_by_hand(*row, 0.3) for row in rows) / 3
    assert actual.item() == pytest.approx(plain.item() + 2 * contrast, rel=1e-5)
    assert loss_of(moon, z, [0, 1, 2]).item() == plain.item()  # a client's first round


def test_moon_remembers_what_features_depend_on() -> None:
    moon = objectives.create("moon")
    start = Teacher(
        Parts(prompts=torch.ones(2, 3), head={"w": torch.ones(1)}, adaptation={"a": torch.ones(1)}),
        torch.ones(2, 5),
    )
    assert set(moon.keeps(start)) == {"prompts", "adaptation.a", "keys"}
    assert moon.teachers(start, {}) == {}
    own = {"prompts": torch.zeros(4, 3), "keys": torch.zeros(4, 5)}
    teachers = moon.teachers(start, own)
    assert teachers["global"] is start
    assert teachers["previous"].parts.prompts is own["prompts"]
    assert teachers["previous"].keys is own["keys"]


@pytest.mark.parametrize(
    "changes",
    [
        ("method=moon_pt",),
        ("method=pfpt", "objective=moon", "prompts.selection=keyed", "prompts.pool=3"),
        ("method=moon_pt", "tuning=lora", "prompts.depth=3"),
    ],
    ids=["all", "keyed", "inner lora"],
)
def test_moon_s_loss_in_the_second_round_is_that_of_a_loop(
    tiny: Overrides, changes: tuple[str, ...]
) -> None:
    """One step of a client at a learning rate of 0, so that the loss is that of the model it began
    with: here features, teachers and contrast are computed once more without the program's loss.
    """
    common = ("clients.per_round=6", "clients.batch_size=400", "head.dropout=0", *changes)
    config = compose("digits", tiny(*common))
    federation = prepare(config)
    settings, state = settings_of(config, federation), initial_state(config, federation)
    worker = ClientWorker(federation.setup)
    job = make_jobs(state, settings)[0]
    first = worker.train(settings.recipe, [job])[0]
    still = compose("digits", tiny(*common, "clients.lr=0")).recipe(10)
    again = type(job)(job.client_id, 2, job.seed, job.broadcast, first.state)
    plain = compose("digits", tiny(*common, "clients.lr=0", "objective=plain")).recipe(10)
    excess = (
        worker.train(still, [again])[0].metrics["loss"]
        - worker.train(plain, [again])[0].metrics["loss"]
    )

    table = federation.data.table
    rows = federation.data.rows(job.client_id, pooled=False)
    kept = first.state.kept.objective
    prompts = torch.zeros_like(job.broadcast.prompts)
    if "prompts" in kept:
        prompts = kept["prompts"]
    tuning = settings.recipe.build_tuning()
    features = []
    for adaptation, values, keys in (
        (job.broadcast.shared.adaptation, job.broadcast.prompts, job.broadcast.keys),
        (
            {p[len("adaptation.") :]: v for p, v in kept.items() if p.startswith("adaptation.")},
            prompts,
            kept.get("keys"),
        ),
    ):
        chosen = torch.arange(len(values))
        if settings.recipe.prompts.selection == "keyed":
            query = torch.from_numpy(table.queries(settings.recipe.prompts.query_kind, rows))
            likeness = torch.nn.functional.normalize(keys, dim=1) @ query.mean(dim=0)
            chosen = likeness.topk(settings.recipe.prompts.count).indices.sort().values
        features.append(
            tuning.encode(worker.backbone, adaptation, table.tokens_at(rows), values[chosen])
        )
    ours, previous = (each.detach().double().tolist() for each in features)
    expected = sum(
        moon_by_hand(z, z, far, 0.5) for z, far in zip(ours, previous, strict=True)
    ) / len(rows)
    assert ours != previous
    assert excess == pytest.approx(expected, rel=1e-4)


def test_moon_is_the_same_after_a_resume_and_its_memory_stays_with_the_client(
    tiny: Overrides,
) -> None:
    options = ("method=moon_pt", "clients.per_round=4", "rounds=3")
    whole = execute(plan_run(compose("digits", tiny(*options)), False))
    assert set(whole.state.clients[0].kept.objective) == {"prompts"}
    assert not whole.state.shared.objective
    plain = compose("digits", tiny("method=fedavg_pt", *options[1:]))
    other = execute(plan_run(plain, True))
    assert [each["bytes_up"] for each in other.reports] == [
        each["bytes_up"] for each in whole.reports
    ]
    assert other.state.sha256() != whole.state.sha256()

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 2:
            raise Stop

    with pytest.raises(Stop):
        execute(plan_run(compose("digits", tiny(*options)), True), stop)
    resumed = execute(plan_resume(whole.run_dir))
    assert resumed.state.sha256() == whole.state.sha256()


@pytest.mark.usefixtures("forgotten_plugins")
def test_the_documented_loss(tmp_path: Path) -> None:
    """The focal loss of docs/methods.md: two classes, p = 3/4, gamma 2."""
    file = tmp_path / "focal.py"
    file.write_text(documented("methods.md", '"""Focal loss'))
    load_plugins([str(file)])
    logits = torch.tensor([[math.log(3), 0.0, -torch.inf]], requires_grad=True)
    loss = loss_of(objectives.create("focal"), logits, [0])
    assert loss.item() == pytest.approx(-((1 - 0.75) ** 2) * math.log(0.75))
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad[:, :2]).all()


def documented(page: str, begin: str) -> str:
    """The program of a page that begins so."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    [program] = [
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if block.startswith(begin)
    ]
    return str(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["objective=moon", "objective.mu=-1"], r"objective\.mu: expected a finite number >= 0"),
        (["objective=moon", "objective.temperature=0"], r"objective\.temperature: .* > 0, got 0"),
        (["objective=label_smoothing", "objective.smoothing=1"], r"objective\.smoothing: .* < 1"),
        (["method=head_only", "objective=moon"], "objective=moon: compares features of two mod"),
    ],
)
def test_wrong_options_are_refused(tiny: Overrides, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("digits", ["compare=[]", *options])
