"""What was run: the head of a page says it, and its command repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import fedprompt
from fedprompt.core.files import json_ready
from fedprompt.report.charts import XY, Matrix
from fedprompt.report.facts import command_of, facts_of, said_of
from fedprompt.report.lines import lines_of
from fedprompt.report.page import page_of
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import read_runs

Overrides = Callable[..., list[str]]


def test_the_head_says_what_was_run_and_how_to_repeat_it(tiny: Overrides, tmp_path: Path) -> None:
    overrides = tiny("partition=dirichlet", "partition.alpha=0.7", "seed=3", "note=Mind the gap.")
    result = fedprompt.run("digits", overrides)
    runs = read_runs([result.run_dir])
    facts = dict(facts_of(runs, lines_of(runs)))
    assert facts["partition"].startswith("dirichlet (alpha 0.7")
    assert facts["clients"].startswith("6, 3 a round, epochs 1, batch_size 16")
    assert (facts["seed"], facts["rounds"], facts["note"]) == ("3", "2", "Mind the gap.")
    assert facts["task"].startswith("digits, 10 classes")
    assert "216 training images" in facts["task"]
    assert "random.safetensors (SHA-256 " in facts["backbone"]
    assert "CPUs, runtime serial" in facts["machine"]
    assert {"method", "head", "versions", "date"} <= facts.keys()

    words = shlex.split(command_of(runs[0].directory))
    assert words[:2] == ["fedprompt", "run"]
    again = fedprompt.run(words[2], [f"run_dir={tmp_path / 'again'}"])
    assert again.summary["state_sha256"] == result.summary["state_sha256"]
    said = shlex.split(said_of(runs[0].directory))
    assert said[:2] == ["fedprompt", "run"]
    assert {"seed=3", "partition.alpha=0.7", "rounds=2", "compare=[]"} <= set(said)

    page = page_of(runs, [result.run_dir])
    titles = {chart.title: chart for chart in page.figures}
    assert {"Loss", "Accuracy against megabytes sent", "Accuracy of each class (%)"} <= set(titles)
    confusion = titles["Confusion matrix: pfpt"]
    assert isinstance(confusion, Matrix)
    sent = titles["Accuracy against megabytes sent"]
    assert isinstance(sent, XY)
    own = titles["Accuracy of each client's own model"]
    assert isinstance(own, XY)
    assert own.shade is not None
    assert "Mean of the worst tenth: pfpt " in own.reading


def test_virtual_hours_have_a_figure_where_a_run_has_them(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    lines = [{"round": i, "accuracy": 0.1 * i, "virtual_hours": 2.5 * i} for i in (1, 2, 3)]
    text = "".join(f"{json_ready(each)}\n".replace("'", '"') for each in lines)
    (run.path / "rounds.jsonl").write_text(text)
    page = page_of(read_runs([run.path]), [run.path])
    (chart,) = [each for each in page.figures if each.title == "Accuracy over virtual time"]
    assert isinstance(chart, XY)
    assert '"7.5", "30.0 %"' in chart.shapes[0].points
