"""`fedprompt list`: every name that an experiment can use, with a line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fedprompt.cli.listing import KINDS, REGISTERED, kind_of, named, words_of
from fedprompt.cli.main import main
from fedprompt.config import list_experiments, list_methods
from fedprompt.core.errors import ConfigError


def test_everything_that_has_a_name_is_listed_with_words() -> None:
    for kind in KINDS:
        found = named(kind)
        assert found
        assert all(each.words for each in found), kind
        assert not any(each.plugin for each in found)
        names = [each.name for each in found]
        assert names == sorted(set(names))
        if kind in REGISTERED:
            assert set(REGISTERED[kind].names()) <= set(names)
    assert [each.name for each in named("experiment")] == list_experiments()
    assert [each.name for each in named("method")] == [each.name for each in list_methods()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: iid  # at random. And more\n", "at random"),
        (
            "# fedprompt run mine\n# What it is, on\n# two lines. More.\nname: mine\n",
            "What it is, on two lines",
        ),
        ("# Source: nobody\nname: mine\n", ""),
        ("name: mine  # this\nother: 1  # not this\n", "this"),
    ],
)
def test_words_are_the_first_sentence_of_the_first_comment(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert words_of(path) == words


def test_kinds_are_known_in_singular_and_plural() -> None:
    assert (
        {kind_of(f"{kind}s") for kind in KINDS} == {kind_of(kind) for kind in KINDS} == set(KINDS)
    )
    with pytest.raises(ConfigError, match=r"list: expected one of .*, got 'agregator'.*aggregator"):
        kind_of("agregator")


def test_the_command_line(tmp_path: Path, forgotten_plugins: None) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import dataclasses\n"
        "from fedprompt.aggregation import Aggregator, aggregators\n"
        "@dataclasses.dataclass\n"
        "class Options: pass\n"
        "@aggregators.register('medoid', Options)\n"
        "class Medoid(Aggregator):\n"
        '    """The set nearest to all others."""\n'
        "    def merge(self, given): ...\n"
    )
    lines = CliRunner().invoke(main, ["list"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(KINDS)
    plain = CliRunner().invoke(main, ["list", "aggregators"]).stdout
    assert "medoid" not in plain
    assert "pfpt        PFPT: probabilistic matching" in plain
    own = CliRunner().invoke(main, ["list", "aggregator", "--plugin", str(mine)]).stdout
    (line,) = (line for line in own.splitlines() if line.startswith("medoid"))
    assert "The set nearest to all others" in line
    assert "[" in line
    wrong = CliRunner().invoke(main, ["list", "planets"])
    assert wrong.exit_code == 2
    assert len(wrong.stderr.strip().splitlines()) == 1


def test_every_option_says_what_it_means() -> None:
    def silent(command: click.Command, path: str) -> list[str]:
        found = [
            f"{path} {each.opts[0]}"
            for each in command.params
            if isinstance(each, click.Option) and not each.help
        ]
        inner = command.commands if isinstance(command, click.Group) else {}
        return found + [line for name in inner for line in silent(inner[name], f"{path} {name}")]

    assert silent(main, "fedprompt") == []
