"""What a shell offers after TAB: names, `KEY=` and its values, run folders.

A shell waits for the answer, so nothing here imports torch or the options' dataclasses. Names are
the files of `conf/`; keys and their values stand in `keys.json`, which `docs/options.py` writes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)

from fedprompt.core.conf import TABLE, conf_root

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_FEDPROMPT_COMPLETE"
"""By which the shell's function asks the program."""
LISTS = {"compare": "method"}
"""Keys whose value is a list of names, and of which kind."""


class Bash(BashComplete):
    """Bash takes `=` for a break between words: `data=dig` are three for it, and it replaces the
    last alone.
    """

    # No blank behind "KEY=".
    source_template = BashComplete.source_template.replace(
        "    return 0\n",
        "    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace\n"
        "    return 0\n",
        1,
    )
    _shown_from = 0

    def get_completion_args(self) -> tuple[list[str], str]:
        """The whole words before the cursor, and the one at it."""
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in [*args, incomplete]:
            joins = bool(words) and (word == "=" or words[-1].endswith("="))
            words[-1:] = [words[-1] + word] if joins else [*words[-1:], word]
        key, equals, _ = words[-1].partition("=")
        self._shown_from = len(key) + 1 if equals and args and args[-1] in ("=", key) else 0
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """A line for the shell: of `KEY=VALUE` what it takes for the word."""
        return f"{item.type},{item.value[self._shown_from :]}"


class Zsh(ZshComplete):
    """As click's, without a blank behind "KEY="."""

    source_template = (
        ZshComplete.source_template.replace(
            "    local -a response\n", "    local -a response\n    local -a unfinished\n", 1
        )
        .replace(
            '            if [[ "$descr" == "_" ]]; then\n',
            '            if [[ "$key" == *[=.] ]]; then\n'
            '                unfinished+=("$key":"$descr")\n'
            '            elif [[ "$descr" == "_" ]]; then\n',
            1,
        )
        .replace(
            '    if [ -n "$completions" ]; then\n',
            '    if [ -n "$unfinished" ]; then\n'
            "        _describe -V unsorted unfinished -U -S ''\n"
            "    fi\n\n"
            '    if [ -n "$completions" ]; then\n',
            1,
        )
    )


add_completion_class(Bash)
add_completion_class(Zsh)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what a shell needs to complete names and keys.

    \b
    bash:  eval "$(fedprompt completion bash)"          in ~/.bashrc
    zsh:   eval "$(fedprompt completion zsh)"           in ~/.zshrc, after compinit
    fish:  fedprompt completion fish | source           in ~/.config/fish/config.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "fedprompt", VARIABLE).source())


# ------------------------------------------------------------ what click asks


def experiment_words(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """First an experiment's name or file, then keys.

    Args:
        ctx: of the command.
        param: the argument.
        incomplete: what is typed of the word.
    """
    return _words(ctx, param, incomplete, experiments())


def sweep_words(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """First a sweep's name or file, then keys.

    Args:
        ctx: of the command.
        param: the argument.
        incomplete: what is typed of the word.
    """
    return _words(ctx, param, incomplete, names_of("sweep"))


def data_words(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`data=NAME` and `data.KEY=VALUE`.

    Args:
        ctx: of the command.
        param: the argument.
        incomplete: what is typed of the word.
    """
    given = ctx.params.get(param.name or "") or ()
    found = override(incomplete, given)
    return [item for item in found if item.type != "plain" or item.value.startswith("data")]


def kinds(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What `fedprompt list` lists.

    Args:
        ctx: of the command.
        param: the argument.
        incomplete: what is typed of the word.
    """
    return _items(("experiment", "sweep", "method", *_index()["groups"]), incomplete)


def runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders of runs, the newest first.

    Args:
        ctx: of the command.
        param: the argument.
        incomplete: what is typed of the word.
    """
    return _folders(incomplete, "config.yaml")


def unfinished_runs(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Folders of runs that can go on.

    Args:
        ctx: of the command.
        param: the argument.
        incomplete: what is typed of the word.
    """
    return _folders(incomplete, "config.yaml", without="summary.json")


def sweeps(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders of sweeps.

    Args:
        ctx: of the command.
        param: the argument.
        incomplete: what is typed of the word.
    """
    return _folders(incomplete, "sweep.yaml")


def compared(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The methods that the run of the command line is compared with.

    Args:
        ctx: of the command.
        param: the option.
        incomplete: what is typed of the word.
    """
    # While the option lacks its value, click leaves the arguments where they are.
    given = [ctx.params.get("run"), ctx.params.get("run_dir"), *ctx.args[:1]]
    found = [path.name for run in given if run for path in Path(run, "compare").glob("*")]
    return _items(sorted(found), incomplete)


# ------------------------------------------------------------ what there is


def experiments() -> list[str]:
    """All names in `conf/experiment`, those in tables included."""
    folder = conf_root() / "experiment"
    found: list[str] = []
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("")
        if name.name != TABLE:
            found.append(name.as_posix())
        else:
            import yaml  # takes longer than all else

            settings = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("settings")
            found += [name.with_name(each).as_posix() for each in settings or ()]
    return sorted(found)


def names_of(group: str) -> list[str]:
    """The names that `GROUP=` takes."""
    files = {path.stem for path in (conf_root() / group).glob("*.yaml")}
    return sorted(files | set(_index()["groups"].get(group, ())))


def override(incomplete: str, given: Iterable[str] = ()) -> list[CompletionItem]:
    """`KEY=`, or its values as soon as the `=` is there.

    Args:
        incomplete: what is typed of the word.
        given: the words before; `aggregator=mean` leaves the options of the others out.
    """
    key, equals, value = incomplete.partition("=")
    return _values(key, value) if equals else _keys(key, given)


def _words(
    ctx: click.Context, param: click.Parameter, incomplete: str, names: list[str]
) -> list[CompletionItem]:
    given = ctx.params.get(param.name or "") or ()
    named = any("=" not in each for each in given) or ctx.params.get("resume")
    if not named:
        return _items(names, incomplete) or [CompletionItem(incomplete, type="file")]
    found = override(incomplete, given)
    is_value = "=" in incomplete
    return found or ([CompletionItem(incomplete, type="file")] if is_value else [])


def _keys(start: str, given: Iterable[str]) -> list[CompletionItem]:
    chosen = dict(each.split("=", 1) for each in given if "=" in each)
    groups: dict[str, Any] = _index()["groups"]
    found = {f"{group}=": f"one of {', '.join(names_of(group))}" for group in groups}
    for row in _index()["keys"]:
        section = row["key"].partition(".")[0]
        if row["owner"] in ("", chosen.get(section, row["owner"])):
            found.setdefault(f"{row['key']}=", row["words"])
    hits = {key: words for key, words in found.items() if key.startswith(start)}
    if "." not in start and hits:  # of a section its name first
        short = {key: words for key, words in hits.items() if "." not in key}
        dotted = {key.partition(".")[0] for key in hits if "." in key}
        hits = {**short, **{f"{each}.": f"options of {each}" for each in sorted(dotted)}}
    elif not hits:  # `alpha` finds `partition.alpha`
        hits = {key: words for key, words in found.items() if f".{start}" in key}
    return [CompletionItem(key, help=words) for key, words in hits.items()]


def _values(key: str, value: str) -> list[CompletionItem]:
    if key in LISTS:  # `[a,b`: the last name of the list
        before, _, last = value.rpartition("," if "," in value else "[")
        opened = f"{before}," if "," in value else "["
        names = names_of(LISTS[key])
        return [CompletionItem(f"{key}={opened}{name}") for name in names if name.startswith(last)]
    if key == "method" or key in _index()["groups"]:
        known: Iterable[str] = names_of(key)
    else:
        rows = [row for row in _index()["keys"] if row["key"] == key]
        known = dict.fromkeys(name for row in rows for name in row["values"])
    return [CompletionItem(f"{key}={name}") for name in known if name.startswith(value)]


def _folders(incomplete: str, mark: str, without: str = "") -> list[CompletionItem]:
    """Folders that hold a file: those in `runs/`, or in the folder that is typed.

    Args:
        incomplete: what is typed.
        mark: name of the file.
        without: name of a file that they must not hold.
    """
    folder = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    places = {Path("runs"), folder} if "/" not in incomplete else {folder}
    try:
        found = [
            (path.stat().st_mtime, path.parent)
            for place in places
            for path in place.glob(f"*/{mark}")
            if not without or not (path.parent / without).exists()
        ]
    except OSError:
        found = []
    names = [str(path) for _, path in sorted(found, reverse=True)]
    return _items(names, incomplete) or [CompletionItem(incomplete, type="dir")]


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@functools.cache
def _index() -> dict[str, Any]:
    text = (resources.files("fedprompt.cli") / "keys.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
