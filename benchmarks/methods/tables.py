"""Tables and figures of the methods benchmark, from the files that runner.py wrote.

    python benchmarks/methods/tables.py [--results benchmarks/results/methods]
                                        [--tables docs/benchmark-tables.md] [--images docs/images]
                                        [--page docs/benchmark.md]
                                        [--bounds benchmarks/results/methods_bounds.json]

Mean and 95 % interval (Student's t over seeds); difference to FedAvg-PT over the seeds that both
have, with interval and two-sided p-value of the paired t test; chosen learning rates; prompts kept;
bytes; seconds. Whatever is there is shown, with its number of seeds. Overviews are written into the
page as well, between marks: the main methods, the goals, the plain backbone, the head alone with
other optimisers, logit adjustment, each test image alone, the other methods, and the ablations;
what changes a method is compared with that method.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grid
import matplotlib as mpl
from figures import accuracy_figure, path_figure, pool_figure
from grid import Cell, is_defined
from runner import best_scale, tried_scales
from summary import Results, lead, read_results, summarise

ROOT = Path(__file__).parents[2]


def points(mean: float | None, half: float | None) -> str:
    """Percent with interval.

    >>> points(0.5, 0.0123), points(0.5, math.nan), points(None, None)
    ('50.0 ± 1.2', '50.0', '-')
    """
    if mean is None:
        return "-"
    known = half is not None and math.isfinite(half)
    return f"{100 * mean:.1f} ± {100 * (half or 0.0):.1f}" if known else f"{100 * mean:.1f}"


def difference(found: Mapping[str, float] | None) -> str:
    """Signed points with interval and p-value."""
    if found is None:
        return "-"
    text = f"{100 * found['mean']:+.1f}"
    if math.isfinite(found["half_width"]):
        text += f" ± {100 * found['half_width']:.1f}"
    if math.isfinite(found["p"]):
        text += f" (p {found['p']:.3f})" if found["p"] >= 0.001 else " (p < 0.001)"
    return text


def markdown(rows: Sequence[Mapping[str, Any]], rates: Sequence[str]) -> str:
    """All tables as one page."""
    heads = (
        *("method", "seeds", "test accuracy (%)", "difference to FedAvg-PT", "at best validation"),
        *("balanced (%)", "clients' own (%)", "worst tenth", "deviation", "Jain"),
        *("over centralised", "own over local only"),
        *("prompts", "MB up", "MB down", "CPU s", "rates x"),
    )
    lines = [
        "# Tables of the methods benchmark",
        "",
        "Made by `benchmarks/methods/tables.py`; do not edit. Mean ± 95 % interval over seeds (t), "
        "paired differences in points.",
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        lines += ["", f"## {setting}", "", "| " + " | ".join(heads) + " |"]
        lines.append("|---" * len(heads) + "|")
        for row in rows:
            if row["setting"] != setting:
                continue
            cells = (
                row["method"],
                str(row["seeds"]),
                points(row.get("accuracy"), row.get("accuracy_half_width")),
                difference(row.get("accuracy_difference")),
                *(
                    points(row.get(name), row.get(f"{name}_half_width"))
                    for name in (
                        *("best_accuracy", "balanced_accuracy"),
                        *("personalised", "worst_tenth", "deviation"),
                    )
                ),
                f"{row['jain']:.3f}" if "jain" in row else "-",
                difference(row.get("over_centralised_difference")),
                difference(row.get("over_local_only_difference")),
                f"{row['prompts']:.0f}",
                f"{row['bytes_up'] / 1e6:.2f}",
                f"{row['bytes_down'] / 1e6:.2f}",
                f"{row['cpu_seconds']:.0f}" if math.isfinite(row["cpu_seconds"]) else "-",
                row["scale"],
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## Choice of learning rates", "", *rates, ""])


def overview(
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Test accuracy of some methods in the settings of the rows, and below it the difference to
    the baseline. Of methods without a global model, the accuracy of the clients' own.

    Args:
        rows: from `summarise`.
        methods: in the order of the table.
        references: what bounds.py found for the frozen head by itself: test accuracy by name.
    """
    found = {(row["setting"], row["method"]): row for row in rows}
    shown = [name for name in grid.SETTINGS if any(row["setting"] == name for row in rows)]
    if not shown:
        return "Nothing has been run yet."
    lines = ["| method | " + " | ".join(name.replace("/", "<br>") for name in shown) + " |"]
    lines.append("|---" * (1 + len(shown)) + "|")
    for method in methods:
        cells = []
        for setting in shown:
            row = found.get((setting, method))
            if row is None:
                cells.append("-" if is_defined(setting, method) else "not defined")
                continue
            measure = "accuracy" if "accuracy" in row else "personalised"
            text = points(row.get(measure), row.get(f"{measure}_half_width"))
            text += f" ({row['seeds']})" + ("" if measure == "accuracy" else " *")
            gain = difference(row.get("accuracy_difference"))
            cells.append(text if gain == "-" else f"{text}<br>{gain}")
        if any(cell not in ("-", "not defined") for cell in cells):
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    for name, scores in (references or {}).items():
        frozen = [
            points(scores["test"], None) if setting.startswith("domains_frozen") else "-"
            for setting in shown
        ]
        lines.append(f"| the frozen head, {name} (nothing trained) | " + " | ".join(frozen) + " |")
    return "\n".join(lines)


def over_others(
    results: Results, method: str, others: Sequence[str], measure: str = "accuracy"
) -> list[str]:
    """Rows for the table of `overview`: a method's difference to some others, in points.

    Args:
        results: from `read_results`, of the settings that the table shows.
        method: which.
        others: with which it is compared.
        measure: `accuracy` of the global model or `personalised`, of the clients' own.
    """
    own = "" if measure == "accuracy" else ", clients' own"
    shown = [setting for setting in grid.SETTINGS if setting in results]
    lines = []
    for other in others:
        cells = [difference(lead(results[setting], method, other, measure)) for setting in shown]
        if set(cells) != {"-"}:
            lines.append(f"| `{method}` over `{other}`{own} | " + " | ".join(cells) + " |")
    return lines


def known_domains(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What domains.py found: accuracy of each domain's images under the prompts of each, by preset
    and partition.

    Args:
        found: method -> partition -> what `ask` returned.
    """
    lines: list[str] = []
    for method, partitions in found.items():
        if preset_of(method) != method:
            continue
        for partition, asked in partitions.items():
            columns = list(next(iter(asked["accuracy"].values())))
            if not lines:
                names = (f"under those of {name}" for name in columns[:-1])
                lines.append("| | images of | " + " | ".join([*names, columns[-1]]) + " |")
                lines.append("|---" * (2 + len(columns)) + "|")
            for domain, scores in asked["accuracy"].items():
                cells = [points(scores[column], None) for column in columns]
                lines.append(f"| `{method}`, {partition} | {domain} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def selecting_together(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What domains.py found: accuracy by how many images of a domain select together.

    Args:
        found: method -> partition -> what `ask` returned.
    """
    lines: list[str] = []
    for method, partitions in found.items():
        for partition, asked in partitions.items():
            if not lines:
                lines.append("| images that select together | " + " | ".join(asked["together"]))
                lines[0] += " |"
                lines.append("|---" * (1 + len(asked["together"])) + "|")
            cells = [points(accuracy, None) for accuracy in asked["together"].values()]
            lines.append(f"| `{method}`, {partition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recognised(found: Mapping[str, Mapping[str, float]]) -> str:
    """What domains.py found: share of images whose query is nearest to their own domain's.

    Args:
        found: kind of query -> domain -> share.
    """
    names = list(next(iter(found.values())))
    lines = ["| query | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for kind, shares in found.items():
        cells = [points(shares[name], None) for name in names]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def preset_of(method: str) -> str:
    """The method that a changed one changes."""
    return Cell("", method, 0).preset


def changed_from(method: str) -> str:
    """With what an ablation is compared: as `preset_of`, and PFPT without matching with PFPT."""
    return "pfpt" if method == grid.NO_MATCHING else preset_of(method)


def goals(results: Results) -> str:
    """What PFPT was to reach and what it reached: its smallest lead over a method without keys,
    for PFPT as it is and with logit adjustment, where that has been run.

    A goal is met where the whole interval lies above zero and the mean at or above the goal, and
    where not to be worse is the goal, where no interval lies below zero; a setting is judged by the
    methods that have been run there with three seeds or more.
    """
    lines = [
        "| method | setting | goal | smallest lead | over | clear of | met |",
        "|---|---|---|---|---|---|---|",
    ]
    adjusted = [each for each in grid.ADJUSTED if preset_of(each) in grid.WITHOUT_KEYS]
    rivals = {"pfpt": grid.WITHOUT_KEYS, grid.ADJUSTED_PFPT: (*grid.WITHOUT_KEYS, *adjusted)}
    for method, setting in itertools.product(rivals, grid.GOALS):
        goal = grid.GOALS[setting]
        leads = {
            other: found
            for other in rivals[method]
            if (found := lead(results.get(setting, {}), method, other)) is not None
            and found["seeds"] >= 3
        }
        if not leads:
            continue
        least = min(leads, key=lambda other: leads[other]["mean"])
        clear = [other for other, found in leads.items() if found["mean"] - found["half_width"] > 0]
        if goal is None:
            met = all(found["mean"] + found["half_width"] >= 0 for found in leads.values())
        else:
            met = len(clear) == len(leads) and leads[least]["mean"] >= goal
        cells = (
            f"`{method}`",
            setting,
            "not worse" if goal is None else f"+{100 * goal:.0f}" if goal else "> 0",
            difference(leads[least]),
            f"`{least}`",
            f"{len(clear)} of {len(leads)}: "
            + (", ".join(f"`{each}`" for each in clear) or "none"),
            "yes" if met else "no",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between two marks of a page.

    Args:
        path: the page.
        name: of the marks.
        text: what is to stand there.

    Raises:
        SystemExit: the page has no such marks.
    """
    marks = f"<!-- {name}: made by benchmarks/methods/tables.py -->", f"<!-- end of {name} -->"
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise SystemExit(f"{path}: expected the marks '{marks[0]}' and '{marks[1]}'; put them back")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _tried(value: float | None) -> str:
    """A cell of the choice of rates."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if value else "diverged"


def rate_lines(folder: Path) -> list[str]:
    """Validation accuracy of every scale that was tried; the chosen one stands out."""
    lines = ["| setting | method | " + " | ".join(f"x {s:g}" for s in grid.ALL_SCALES) + " |"]
    lines.append("|---" * (2 + len(grid.ALL_SCALES)) + "|")
    cells = grid.rate_cells(grid.final_cells())
    for cell in dict.fromkeys((cell.setting, cell.method) for cell in cells):
        tried = tried_scales(*cell, folder)
        if not tried:
            continue
        shown = [
            f"**{100 * tried[scale]:.1f}**"
            if scale == best_scale(tried)
            else _tried(tried.get(scale))
            for scale in grid.ALL_SCALES
        ]
        lines.append(f"| {cell[0]} | {cell[1]} | " + " | ".join(shown) + " |")
    return lines


def page_tables(
    results: Results,
    rows: Sequence[Mapping[str, Any]],
    references: Mapping[str, Mapping[str, float]],
) -> dict[str, str]:
    """The tables that stand in the page, by the name of their marks.

    Args:
        results: from `read_results`.
        rows: from `summarise`, compared with FedAvg-PT.
        references: as for `overview`.
    """

    def among(these: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> list[Any]:
        return [row for row in these if row["setting"] in settings]

    plain = [setting for setting in grid.SETTINGS if setting.startswith("domains_plain")]
    mains = [setting for setting in grid.SETTINGS if setting not in plain]
    main_results = {setting: results[setting] for setting in mains if setting in results}
    adjusted = {name: results[name] for name in grid.ADJUSTED_SETTINGS if name in results}
    ablated = {name: results[name] for name in grid.ABLATION_SETTINGS if name in results}
    both_heads = (*grid.OTHER_SETTINGS, *grid.ABLATION_SETTINGS)
    of_both_heads = {name: results[name] for name in both_heads if name in results}
    compared = [each for each in grid.MAIN if each not in ("pfpt", "fedavg_pt")]
    both = [each for method in grid.ADJUSTED for each in (preset_of(method), method)]
    to_preset = summarise(results, preset_of)
    ablations = ("pfpt", grid.NO_MATCHING, *grid.ABLATIONS, *grid.DIAGNOSTICS)
    alone = list(
        dict.fromkeys(each for method in grid.ALONE for each in (preset_of(method), method))
    )
    return {
        "overview": "\n".join(
            [
                overview(among(rows, mains), grid.MAIN, references),
                *over_others(main_results, "pfpt", compared),
                *over_others(main_results, "pfpt", ["pfedpg"], "personalised"),
            ]
        ),
        "goals": goals(results),
        "plain": overview(among(rows, plain), grid.FIVE_SEEDS),
        "one domain": overview(
            among(summarise(results, changed_from), grid.ONE_DOMAIN_SETTINGS),
            ("pfpt", *grid.ONE_DOMAIN, "fedavg_pt_plus", "fedavg_pt", "head_only"),
        ),
        "heads": overview(among(to_preset, grid.PROBE_SETTINGS), ("head_only", *grid.PROBES)),
        "adjusted": "\n".join(
            [
                overview(among(to_preset, grid.ADJUSTED_SETTINGS), (*both, "fedcof")),
                *over_others(adjusted, grid.ADJUSTED_PFPT, (*both[2:], "fedcof")),
            ]
        ),
        "alone": "\n".join(
            [
                overview(among(to_preset, grid.ABLATION_SETTINGS), (*alone, "fedavg_pt", "fedcof")),
                *over_others(ablated, grid.ALONE_PFPT, (*grid.WITHOUT_KEYS, grid.ALONE_PLUS)),
                *over_others(ablated, grid.WHITENED_PFPT, (grid.WHITENED_PLUS,)),
            ]
        ),
        "others": "\n".join(
            [
                overview(among(rows, both_heads), ("fedavg_pt", *grid.OTHERS)),
                *over_others(of_both_heads, "pfpt", (*grid.PLUS, "centralised")),
            ]
        ),
        "ablations": overview(
            among(summarise(results, changed_from), grid.ABLATION_SETTINGS), ablations
        ),
    }


def draw(folder: Path, images: Path, results: Results, rows: Sequence[Mapping[str, Any]]) -> None:
    """All figures of what has been run.

    Args:
        folder: of the results.
        images: where the figures go.
        results: from `read_results`.
        rows: from `summarise`.
    """
    images.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["font.size"] = 9
    pictures = {"methods": accuracy_figure(rows), "methods_pool": pool_figure(results)}
    for setting in (f"domains_frozen/{partition}" for partition in grid.PARTITIONS):
        picture = path_figure(folder, setting)
        if picture is not None:
            pictures[f"methods_path_{setting.split('/')[1]}"] = picture
    for name, picture in pictures.items():
        picture.savefig(images / f"{name}.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "methods")
    parser.add_argument("--tables", type=Path, default=ROOT / "docs" / "benchmark-tables.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument(
        "--bounds", type=Path, default=ROOT / "benchmarks" / "results" / "methods_bounds.json"
    )
    parser.add_argument(
        "--domains", type=Path, default=ROOT / "benchmarks" / "results" / "methods_domains.json"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmark.md")
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    if not results:
        raise SystemExit(f"no results in {arguments.results}: run make bench-methods first")
    rows = summarise(results)
    arguments.tables.parent.mkdir(parents=True, exist_ok=True)
    arguments.tables.write_text(markdown(rows, rate_lines(arguments.results)), encoding="utf-8")
    references = {}
    if arguments.bounds.is_file():
        bounds = json.loads(arguments.bounds.read_text(encoding="utf-8"))
        references = bounds["frozen head"]
    tables = page_tables(results, rows, references)
    if arguments.domains.is_file():
        asked = json.loads(arguments.domains.read_text(encoding="utf-8"))
        asked.pop("machine")
        tables["recognised"] = recognised(asked.pop("recognised"))
        tables["domains"] = known_domains(asked)
        tables["together"] = selecting_together(asked)
    for name, table in tables.items():
        put_between(arguments.page, name, table)
    draw(arguments.results, arguments.images, results, rows)
    print(f"{sum(row['seeds'] for row in rows)} runs in {arguments.tables}")


if __name__ == "__main__":
    main()
