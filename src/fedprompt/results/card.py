"""The model card of an exported model: what it is, how good it is, how to use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import fedprompt
from fedprompt.config import ExperimentConfig
from fedprompt.core.files import Json
from fedprompt.models.selection import PromptOptions
from fedprompt.results.model import PromptedModel
from fedprompt.runs.summary import Run, summary_row


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was exported."""

    folder: Path
    client: int | None
    """Whose model it is; None for the global one."""
    round: int
    """Of the state that it is made of."""
    size: int
    """Bytes."""
    difference: float | None
    """The largest between a logit of the model and of its graph; None without a graph."""
    checked_on: str
    """The images that the graph was checked on."""


def model_card(made: Exported, config: ExperimentConfig, model: PromptedModel, run: Run) -> str:
    """The text of `README.md`.

    Args:
        made: what was exported.
        config: of the run's method.
        model: that was exported.
        run: with the records up to the exported round.
    """
    title = f"{run.name} on {config.data.name}"
    owner = "" if made.client is None else f", the model of client {made.client}"
    blocks = [
        "---\nlibrary_name: fedprompt\npipeline_tag: image-classification\n---",
        f"# {title}{owner}",
        f"A Vision Transformer that {config.clients.population} clients adapted together without "
        f"showing each other their images, simulated by fedprompt. It tells "
        f"{len(model.class_names)} classes apart.",
        "## The run",
        _table(("", ""), _facts(made, config, model, run)),
        "## Accuracy",
        *_accuracy(made, config, run),
        "## Preprocessing",
        _preprocessing(model),
        "## Use",
        _use(made, model),
        "## Classes",
        _listed(model.class_names),
    ]
    if len(model.domains) > 1:
        names = model.class_names
        rows = [(name, ", ".join(names[one] for one in own)) for name, own in model.domains.items()]
        blocks += ["## Domains", _table(("domain", "its classes"), rows)]
    return "\n\n".join(blocks) + "\n"


def _facts(
    made: Exported, config: ExperimentConfig, model: PromptedModel, run: Run
) -> Iterable[tuple[str, str]]:
    manifest, prompts = run.directory.read_manifest(), config.prompts
    partition = _named(config.partition.name, dataclasses.asdict(config.partition.options))
    state = run.status.get("state", "unknown")
    yield "data", _named(config.data.name, dataclasses.asdict(config.data.options))
    yield "domains", ", ".join(model.domains) or "one"
    yield "partition", f"{partition}; {config.clients.population} clients"
    yield "seed", str(config.seed)
    yield "method", _method(config)
    yield "backbone", _backbone(config, manifest)
    if prompts.count:
        yield "prompts", f"{len(model.network.prompts)}; {_selection(prompts)}"
    yield "head", f"{config.head.name}, {config.head.mode}"
    yield (
        "rounds",
        f"{made.round} of {config.rounds}, {config.clients.cohort_size} clients each"
        + ("" if state == "finished" else f" (the run is {state})"),
    )
    yield "model of", "all clients" if made.client is None else f"client {made.client}"
    yield "made with", _versions(manifest)
    yield "date of the run", str(manifest.get("date", "unknown"))
    if config.note:
        yield "note", config.note


def _method(config: ExperimentConfig) -> str:
    """The label, and the plug-ins that make the method."""
    parts = [f"aggregator {config.aggregator.name}", f"objective {config.objective.name}"]
    if config.generator.name != "none":
        parts.append(f"generator {config.generator.name}")
    if config.tuning.name != "none":
        parts.append(f"tuning {config.tuning.name}")
    return f"{config.label} ({', '.join(parts)})"


def _backbone(config: ExperimentConfig, manifest: Mapping[str, object]) -> str:
    place = f", prompts before block {config.cut}" if config.needs_tokens else ""
    tuned = "frozen" if config.tuning.name == "none" else f"tuned by {config.tuning.name}"
    name = Path(config.model.backbone).name  # a file's folder says nothing to others
    digest = str(manifest.get("backbone_sha256"))[:12]
    return f"{name}, {tuned}{place}; sha256 {digest}"


def _selection(options: PromptOptions) -> str:
    """How an image gets its prompts."""
    if options.selection == "all":
        return "every image gets all"
    rule = {"keyed": "the nearest keys", "l2p": "the most similar prompts"}[options.selection]
    soft = options.choice == "soft" and options.sends_keys
    mixed = ", and predictions are mixed by how probable each key is" if soft else ""
    return f"an image gets {options.count}, by {rule}{mixed}"


def _versions(manifest: Json) -> str:
    """Versions and commit, as the manifest of the run has them."""
    packages = manifest.get("packages") or {}
    version = packages.get("fedprompt") or fedprompt.__version__
    git = manifest.get("git") or {}
    changed = " with local changes" if git.get("dirty") else ""
    commit = f"commit {git['commit']}{changed}" if git.get("commit") else "commit unknown"
    return f"fedprompt {version}, {commit}; torch {packages.get('torch')}"


def _accuracy(made: Exported, config: ExperimentConfig, run: Run) -> list[str]:
    """What the run measured, as the run recorded it."""
    if made.client is not None:
        return _client_accuracy(made.client, run)
    row, together = summary_row(run), config.prompts.eval_batch
    if row["accuracy"] is None:
        return ["The run measured none up to this round."]
    batched = config.prompts.selects_together
    first = f"{together} images of one domain choose prompts together" if batched else "overall"
    rows = [(first, _percent(row["accuracy"]), _last(run, "accuracy"))]
    if batched or row["alone_accuracy"] is not None:
        alone = _percent(row["alone_accuracy"])
        rows.append(("each image chooses by itself", alone, _last(run, "alone_accuracy")))
    rows.append(("mean over classes", _percent(row["balanced_accuracy"]), _last(run, "accuracy")))
    for name, share in (row["domain_accuracy"] or {}).items():
        rows.append((f"domain {name}", _percent(share), _last(run, "accuracy")))
    table = _table(("on the test split of the run", "accuracy (%)", "after round"), rows)
    note = "The model knew the domain of each image, and chose among the classes of that domain."
    return [table, note] if row["domain_accuracy"] else [table]


def _client_accuracy(client: int, run: Run) -> list[str]:
    """Of the client's own model on its own share of the test split."""
    for record in reversed(run.records):
        found = ((record.get("personalised") or {}).get("test") or {}).get("by_client") or {}
        if str(client) in found:
            rows = [("its own share", _percent(found[str(client)]), str(record["round"]))]
            return [_table(("on the test split of the run", "accuracy (%)", "after round"), rows)]
    return [f"The run did not measure the model of client {client}."]


def _last(run: Run, key: str) -> str:
    """The last round that has a figure."""
    rounds, _ = run.series(key)
    return str(rounds[-1]) if rounds else "-"


def _preprocessing(model: PromptedModel) -> str:
    transform, side = model.backbone.transform, model.side
    behind = (
        "Transparency is dropped."
        if model.background is None
        else f"Transparent pixels stand on {model.background}."
    )
    steps = [
        f"RGB, uint8. {behind} The shorter side becomes {side} pixels (bilinear, antialiased), "
        f"and the middle {side} x {side} is cut out.",
        f"Values divided by 255; the shorter side becomes {transform.shorter_side} pixels "
        f"({transform.interpolation}, antialiased), and the middle {transform.image_size} x "
        f"{transform.image_size} is cut out.",
        f"Mean {_numbers(transform.mean)} is subtracted; the rest is divided by "
        f"{_numbers(transform.std)}.",
    ]
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(steps, 1))
    return f"{listed}\n\n`predict` does all of it. The graph expects the result of the first step."


def _use(made: Exported, model: PromptedModel) -> str:
    python = (
        "```python\nimport fedprompt\n\n"
        f'model = fedprompt.load("{made.folder.name}")  # a torch.nn.Module\n'
        'print(model.predict(["photo.png"]).classes)\n```'
    )
    shell = f"```\nfedprompt predict {made.folder.name} photo.png\n```"
    if made.difference is None:
        return f"{python}\n\n{shell}"
    side, alone = model.side, ""
    if model.recipe.prompts.selects_together:
        alone = (
            " In the graph each image chooses its prompts by itself, whatever else is in the batch;"
            " `predict(images, batch=16)` lets several choose together."
        )
    graph = (
        f"`model.onnx`: `images` (N, {side}, {side}, 3) uint8 to `logits` (N, "
        f"{len(model.class_names)}), for any N. On {made.checked_on} its logits differ from the "
        f"model's by at most {made.difference:.1e}.{alone}"
    )
    runtime = (
        "```python\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{made.folder.name}/model.onnx")\n'
        '[logits] = session.run(["logits"], {"images": images})\n```'
    )
    return "\n\n".join((python, shell, graph, runtime))


def _named(name: str, options: Mapping[str, object]) -> str:
    """A name with its options; what is not set is left out, and of a file where it lies."""
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if isinstance(value, str) and Path(value).is_absolute():
            given[key] = Path(value).name
    listed = ", ".join(f"{key}={value}" for key, value in given.items())
    return f"{name} ({listed})" if listed else name


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Text that ends no cell and no line."""
    return " ".join(text.split()).replace("|", "\\|")


def _listed(names: Iterable[str]) -> str:
    """Number and name of each, as they are: names may hold what Markdown would take for marks."""
    lines = [f"{number} {' '.join(name.split())}" for number, name in enumerate(names)]
    return "\n".join(["~~~", *lines, "~~~"])


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f}"
