"""The tutorials run: all cells in order, smaller than `make docs` runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
FEW = "data={name: digits, train: 0.12, validation: 0.05, test: 0.05}"
SMALL = ["rounds=1", "runtime=serial", "clients.epochs=1", "clients.count=4", "clients.per_round=2"]


def cells(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return found


def play(name: str, **smaller: object) -> dict[str, Any]:
    """Run the cells; what the tagged one sets is set anew.

    Returns:
        The variables at the end, and under `_` the value of the last line of the last cell.
    """
    variables: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), variables)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert smaller.keys() <= variables.keys()
            variables |= smaller
    return variables


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten_plugins: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_what_came_out(path: Path) -> None:
    code = [cell for cell in cells(path.stem) if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code) == 1


def test_first_run() -> None:
    found = play("first_run", settings=[*SMALL, FEW, "compare=[head_only]"])
    assert set(found["result"].rounds()["method"]) == {"pfpt", "head_only"}


def test_reading_results(capsys: pytest.CaptureFixture[str]) -> None:
    found = play("reading_results", settings=[*SMALL, FEW, "compare=[]"])
    assert found["found"].probabilities.shape == (10, 10)
    assert "shown:     [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in capsys.readouterr().out


def test_own_data(capsys: pytest.CaptureFixture[str]) -> None:
    found = play(
        "own_data", settings=[*SMALL[:2], "compare=[]", "data.validation=0.3"], per_class=12
    )
    assert set(found["table"]["group"]) == {"day", "night"}
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "ring" in line  # the class that is refused


def test_own_aggregator() -> None:
    found = play("own_aggregator", settings=[*SMALL, FEW, "compare=[]"])
    assert found["merged"].prompts.tolist() == [[1.0, 0.0]]
    assert set(found["accuracies"]) == {"medoid", "mean"}


@pytest.mark.cluster
def test_cluster() -> None:
    found = play("cluster", settings=[*SMALL[:1], FEW, "compare=[]", "rounds=2"])
    digests = [found[name].summary["state_sha256"] for name in ("serial", "parallel", "resumed")]
    assert len(set(digests)) == 1
