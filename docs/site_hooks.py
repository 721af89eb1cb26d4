"""What `make docs` does beside mkdocs: it runs the tutorials, writes the reference of the command
line and of Python, and leads links out of `docs/` to where the code is.
"""

from __future__ import annotations

import html
import inspect
import os
import posixpath
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file, not a package
from links import outward

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Documents of the root that are pages of the site, too."""
SECONDS = 600
"""That a cell of a tutorial may take."""
NOTEBOOK = re.compile(r"(\]\([\w./-]+)\.ipynb\)(?! to keep)")
PYTHON = {
    "Run and load": ["fedprompt.run", "fedprompt.resume", "fedprompt.load"],
    "Results": [
        *("fedprompt.experiment.RunResult", "fedprompt.results.model.PromptedModel"),
        *("fedprompt.results.model.Predictions", "fedprompt.results.evaluation.evaluate_on"),
    ],
    "Aggregation": [
        *("fedprompt.aggregation.create", "fedprompt.aggregation.base.Aggregator"),
        *("fedprompt.aggregation.base.AggregationInput", "fedprompt.aggregation.base.Aggregation"),
    ],
    "Objectives and data": [
        *("fedprompt.objectives.base.Objective", "fedprompt.data.task.Task"),
        "fedprompt.data.task.Split",
    ],
    "What travels": [
        *("fedprompt.core.types.ClientJob", "fedprompt.core.types.ClientUpdate"),
        "fedprompt.core.types.ServerState",
    ],
    "Errors": ["fedprompt.core.errors"],
}
"""What the page of the Python interface has, by its headings."""


# ------------------------------------------------------------ called by mkdocs


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made: tutorials, references, documents of the root."""
    from mkdocs.structure.files import File

    made = {"reference/cli.md": command_line(), "reference/python.md": python()}
    for source, page in ELSEWHERE.items():
        if source != "README.md":
            made[page] = (ROOT / source).read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        made[f"tutorials/{path.stem}.md"] = executed(path)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to where their target is: a page, or the code's own place."""
    source = page.file.src_uri
    root = {page: source for source, page in ELSEWHERE.items()}.get(source)
    inside = source not in ELSEWHERE.values() or source == "index.md"
    folder = posixpath.dirname(f"docs/{source}") if inside or root is None else "."

    def stays(path: str) -> bool:
        name = path.removeprefix("docs/")
        return path in ELSEWHERE or (path.startswith("docs/") and files.get_file_from_path(name))

    text = outward(markdown, folder, config.repo_url or "", stays)
    for name, target in ELSEWHERE.items():
        there = posixpath.relpath(target, posixpath.dirname(source) or ".")
        back = posixpath.relpath(name, folder)
        text = text.replace(f"]({back})", f"]({there})").replace(f"]({back}#", f"]({there}#")
    if folder == ".":
        text = text.replace("](docs/", "](")
    return NOTEBOOK.sub(r"\1.md)", text)  # a notebook is a page here


# ------------------------------------------------------------ pages that are made


def command_line() -> str:
    """All commands with their arguments and options, from click."""
    from fedprompt.cli.main import main

    lines = [
        "# Command line",
        "",
        "Made from the program. `fedprompt COMMAND --help` says the same.",
    ]
    top = click.Context(main, info_name="fedprompt")
    for name in main.list_commands(top):
        command = main.get_command(top, name)
        assert command is not None
        lines += ["", *_command(command, click.Context(command, parent=top, info_name=name))]
    return "\n".join(lines) + "\n"


def _command(command: click.Command, ctx: click.Context) -> Iterator[str]:
    yield f"## fedprompt {ctx.info_name}"
    yield ""
    yield f"```\n{command.get_usage(ctx).removeprefix('Usage: ')}\n```"
    yield ""
    words = inspect.cleandoc(command.help or "")
    if "\b" in words:  # lines that click leaves as they are
        words = "\n".join(
            f"```\n{textwrap.dedent(part).strip()}\n```" if part.startswith("\n") else part
            for part in words.split("\b")
        )
    yield words
    rows = [record for each in command.get_params(ctx) if (record := each.get_help_record(ctx))]
    rows = [row for row in rows if row[1]]  # arguments stand in the usage
    if rows:
        yield ""
        yield "| option | meaning |"
        yield "|---|---|"
        for option, meaning in rows:
            words = html.escape(" ".join(meaning.split()), quote=False)
            words = words.replace("[", "\\[").replace("|", "\\|").replace("*", "\\*")
            yield f"| `{option.replace('|', '/')}` | {words} |"


def python() -> str:
    """Directives of mkdocstrings."""
    lines = ["# Python", "", "What a script or a plug-in calls. All else may change."]
    for heading, names in PYTHON.items():
        lines += ["", f"## {heading}", *(f"\n::: {name}" for name in names)]
    return "\n".join(lines) + "\n"


def executed(path: Path) -> str:
    """A notebook as a page: its cells, and what came out of them here and now.

    Raises:
        CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors alone
            timeout=SECONDS,
            resources={"metadata": {"path": folder}},
        )
        if os.environ.get("TUTORIALS", "1") != "0":  # without, a look at pages and links is quick
            client.execute()
    parts = [f"[A notebook]({path.name}) to keep; executed when this site was built."]
    head, *rest = notebook.cells
    parts = [head.source, *parts]
    for cell in rest:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            parts.append(f"```python\n{cell.source}\n```")
            parts += _outputs(cell.outputs)
    return "\n\n".join(parts) + "\n"


def _outputs(outputs: Iterable[Any]) -> Iterator[str]:
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                yield f"```text\n{output.text.rstrip()}\n```"
            continue
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![What the cell drew](data:image/png;base64,{data['image/png'].strip()})"
        elif "text/html" in data:
            yield data["text/html"].replace("\n\n", "\n")
        elif "text/plain" in data:
            yield f"```text\n{data['text/plain']}\n```"
