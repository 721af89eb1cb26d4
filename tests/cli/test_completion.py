"""What shells complete: names, keys and their values, run folders; at once, and in real shells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from fedprompt.cli import completion
from fedprompt.cli.fetch import NAMES
from fedprompt.cli.main import main
from fedprompt.config import GROUPS, list_experiments, list_methods
from fedprompt.fetch import real

BASH = shutil.which("bash")


def offered(*words: str, shell: str = "fish") -> list[str]:
    """Values that are offered for the last word."""
    kind = get_completion_class(shell)
    assert kind is not None
    asked = kind(main, {}, "fedprompt", completion.VARIABLE)
    return [item.value for item in asked.get_completions(list(words[:-1]), words[-1])]


def bash(words: str, cword: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that bash gets, for words as it breaks them."""
    kind = get_completion_class("bash")
    assert kind is not None
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(cword))
    return kind(main, {}, "fedprompt", completion.VARIABLE).complete().splitlines()


def test_commands_and_experiments() -> None:
    assert {"run", "sweep", "completion"} <= set(offered(""))
    assert offered("run", "") == list_experiments()
    assert offered("run", "quick") == ["quickstart"]
    assert offered("partition", "quick") == ["quickstart"]
    assert offered("sweep", "alpha") == ["alpha_prompts"]
    assert set(offered("list", "")) == {"experiment", "sweep", "method", *GROUPS}


def test_names_that_are_written_down_twice_are_the_same() -> None:
    assert set(NAMES) == set(real.NAMES)
    assert (
        completion.experiments() == list_experiments()
        or sorted(completion.experiments()) == list_experiments()
    )
    assert completion.names_of("method") == [each.name for each in list_methods()]


def test_keys_after_the_name() -> None:
    found = offered("run", "quickstart", "")
    assert {"method=", "rounds=", "aggregator=", "prompts.", "partition."} <= set(found)
    assert not any(each.startswith("prompts.") and each != "prompts." for each in found)
    assert {"prompts.count=", "prompts.choice="} <= set(offered("run", "quickstart", "prompts.c"))
    assert offered("run", "quickstart", "alpha") == ["partition.alpha="]
    assert "prompts.count=" in offered("run", "--resume", "runs/x", "prompts.")
    # Of an aggregator that is named, its own options.
    assert "aggregator.variant=" in offered("run", "quickstart", "aggregator.")
    assert offered("run", "quickstart", "aggregator=mean", "aggregator.va") == []
    assert "aggregator.variant=" in offered("run", "x", "aggregator=pfpt", "aggregator.va")


def test_values_of_keys() -> None:
    assert offered("run", "quickstart", "method=fedavg") == [
        "method=fedavg_pt",
        "method=fedavg_pt_plus",
    ]
    assert offered("run", "quickstart", "prompts.selection=") == [
        f"prompts.selection={name}" for name in ("keyed", "l2p", "all")
    ]
    assert offered("run", "quickstart", "head.bias=t") == ["head.bias=true"]
    assert offered("run", "quickstart", "compare=[head_only,fedc") == ["compare=[head_only,fedcof"]
    assert offered("run", "quickstart", "compare=[fedc") == ["compare=[fedcof"]
    assert offered("evaluate", "runs/x", "da") == ["data=", "data."]
    assert offered("evaluate", "runs/x", "data=dig") == ["data=digits"]


def test_folders_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, files in {
        "runs/done": ("config.yaml", "summary.json"),
        "runs/stopped": ("config.yaml",),
        "runs/sweep-a": ("sweep.yaml",),
        "runs/nothing": (),
        "else/run": ("config.yaml",),
    }.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).touch()
    (tmp_path / "runs/done/compare/head_only").mkdir(parents=True)
    for command in ("predict", "evaluate", "report", "replay"):
        assert set(offered(command, "")) == {"runs/done", "runs/stopped"}
    assert offered("run", "--resume", "") == ["runs/stopped"]
    assert offered("sweep", "--resume", "r") == ["runs/sweep-a"]
    assert offered("predict", "else/") == ["else/run"]
    assert offered("predict", "runs/done", "--method", "") == ["head_only"]
    assert offered("replay", "runs/done", "--method", "h") == ["head_only"]


def test_bash_breaks_words_at_the_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """COMP_WORDS of `fedprompt run quickstart data=dig`, and with the cursor behind the `=`."""
    assert bash("fedprompt run quickstart data = dig", 5, monkeypatch) == ["plain,digits"]
    assert "plain,digits" in bash("fedprompt run quickstart data =", 4, monkeypatch)
    assert bash("fedprompt nothing so", 2, monkeypatch) == []  # and no error on the screen
    assert bash("fedprompt run quickstart rounds = 3 alpha", 6, monkeypatch) == [
        "plain,partition.alpha="
    ]


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_a_real_bash_completes(tmp_path: Path) -> None:
    """Its own function is sourced and called; the program behind it is this interpreter."""
    program = tmp_path / "fedprompt"
    code = "import sys; sys.argv[0] = 'fedprompt'; from fedprompt.cli.main import main; main()"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    printed = CliRunner().invoke(main, ["completion", "bash"])
    assert printed.exit_code == 0
    script = printed.stdout + (
        "compopt() { echo option $2; }\n"
        "COMP_WORDS=(fedprompt run quickstart data = dig); COMP_CWORD=5\n"
        f"_fedprompt_completion {program}; echo ${{COMPREPLY[@]}}; COMPREPLY=()\n"
        "COMP_WORDS=(fedprompt run quickstart alph); COMP_CWORD=3\n"
        f"_fedprompt_completion {program}; echo ${{COMPREPLY[@]}}\n"
    )
    result = subprocess.run([str(BASH)], input=script, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["digits", "option nospace", "partition.alpha="]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_of_each_shell(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert completion.VARIABLE in result.stdout
    # Click's own scripts have the places where ours says what comes after "KEY=".
    assert shell == "fish" or "nospace" in result.stdout or "unfinished" in result.stdout
    interpreter = shutil.which(shell)
    if interpreter is not None:
        checked = subprocess.run(
            [interpreter, "-n"], input=result.stdout, capture_output=True, text=True, timeout=60
        )
        assert checked.returncode == 0, checked.stderr
    wrong = CliRunner().invoke(main, ["completion", "tcsh"])
    assert wrong.exit_code == 2
    assert len(wrong.stderr.strip().splitlines()) == 1


def test_nothing_heavy_is_imported() -> None:
    """A shell waits for each answer; torch alone takes seconds."""
    code = (
        "import os, sys\n"
        "sys.argv[0] = 'fedprompt'\n"
        "os.environ.update(COMP_WORDS='fedprompt ' + sys.argv[1], COMP_CWORD=sys.argv[2])\n"
        f"os.environ['{completion.VARIABLE}'] = 'bash_complete'\n"
        "from fedprompt.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'numpy', 'ray', 'omegaconf', 'pandas', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    for words, number in (("run quickstart prompts.", "3"), ("run ", "2"), ("pretrain --", "2")):
        result = subprocess.run(
            [sys.executable, "-c", code, words, number], capture_output=True, text=True, check=True
        )
        *lines, heavy = result.stdout.splitlines()
        assert lines and heavy == "[]", (words, result.stdout)
