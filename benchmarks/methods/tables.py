"""Tables and figures of the methods benchmark, from the tables that runner.py wrote.

    python -m benchmarks.methods.tables [--results benchmarks/results/methods]
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
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.harness import DOCS, IMAGES, RESULTS, Json, Paired, put_between, read_json
from benchmarks.methods import details, grid
from benchmarks.methods.figures import accuracy_figure, path_figure, pool_figure
from benchmarks.methods.grid import Cell, is_defined
from benchmarks.methods.results import FOLDER, Store
from benchmarks.methods.runner import tried_scales
from benchmarks.methods.summary import (
    Results,
    Summary,
    lead,
    read_results,
    summarise,
)
from benchmarks.methods.text import difference, percent, points, rate_cells, table

HEADS = (
    *("method", "seeds", "test accuracy (%)", "difference to FedAvg-PT", "at best validation"),
    *("balanced (%)", "clients' own (%)", "worst tenth", "deviation", "Jain"),
    *("over centralised", "own over local only"),
    *("prompts", "MB up", "MB down", "CPU s", "rates x"),
)


def all_figures(row: Summary) -> list[str]:
    """A method's line under `HEADS`."""
    means = row.means
    return [
        row.method,
        str(row.seeds),
        points(means.get("accuracy")),
        difference(row.gain),
        *(
            points(means.get(name))
            for name in (
                *("best_accuracy", "balanced_accuracy"),
                *("own", "own_worst_tenth", "own_deviation"),
            )
        ),
        f"{means['own_jain'].mean:.3f}" if "own_jain" in means else "-",
        difference(row.over_centralised),
        difference(row.over_local_only),
        f"{row.prompts:.0f}",
        f"{row.bytes_up / 1e6:.2f}",
        f"{row.bytes_down / 1e6:.2f}",
        f"{row.cpu_seconds:.0f}" if math.isfinite(row.cpu_seconds) else "-",
        ", ".join(f"{scale:g}" for scale in row.scales),
    ]


def markdown(rows: Sequence[Summary], rates: Sequence[str]) -> str:
    """All tables as one page.

    Args:
        rows: from `summarise`.
        rates: lines about the choice of learning rates.
    """
    lines = [
        "# Tables of the methods benchmark",
        "",
        "Made by `python -m benchmarks.methods.tables`; do not edit. Mean ± 95 % interval over "
        "seeds (t), paired differences in points.",
    ]
    for setting in dict.fromkeys(row.setting for row in rows):
        figures = [all_figures(row) for row in rows if row.setting == setting]
        lines += ["", f"## {setting}", "", *table(HEADS, figures)]
    return "\n".join([*lines, "", "## Choice of learning rates", "", *rates, ""])


def overview(
    rows: Sequence[Summary], methods: Sequence[str], references: Mapping[str, Json] | None = None
) -> str:
    """Test accuracy of some methods in the settings of the rows, and below it the difference to
    the baseline. Of methods without a global model, the accuracy of the clients' own.

    Args:
        rows: from `summarise`.
        methods: in the order of the table.
        references: what bounds.py found for the frozen head by itself: test accuracy by name.
    """
    found = {(row.setting, row.method): row for row in rows}
    shown = [name for name in grid.SETTINGS if any(row.setting == name for row in rows)]
    if not shown:
        return "Nothing has been run yet."
    lines = []
    for method in methods:
        cells = [accuracy_cell(found.get((name, method)), name, method) for name in shown]
        if any(cell not in ("-", "not defined") for cell in cells):
            lines.append([f"`{method}`", *cells])
    for name, scores in (references or {}).items():
        frozen = [
            percent(scores["test"]) if setting.startswith("domains_frozen") else "-"
            for setting in shown
        ]
        lines.append([f"the frozen head, {name} (nothing trained)", *frozen])
    return "\n".join(table(["method", *(name.replace("/", "<br>") for name in shown)], lines))


def accuracy_cell(row: Summary | None, setting: str, method: str) -> str:
    """What `overview` says of a method in a setting; `row` is None where it was not run."""
    if row is None:
        return "-" if is_defined(setting, method) else "not defined"
    if "accuracy" in row.means:
        text = f"{points(row.means['accuracy'])} ({row.seeds})"
    else:
        text = f"{points(row.means.get('own'))} ({row.seeds}) *"
    return text if row.gain is None else f"{text}<br>{difference(row.gain)}"


def over_others(
    results: Results, method: str, others: Sequence[str], measure: str = "accuracy"
) -> list[str]:
    """Rows for the table of `overview`: a method's difference to some others, in points.

    Args:
        results: from `read_results`, of the settings that the table shows.
        method: which.
        others: with which it is compared.
        measure: `accuracy` of the global model or `own`, of the clients' own.
    """
    own = "" if measure == "accuracy" else ", clients' own"
    shown = [setting for setting in grid.SETTINGS if setting in results]
    lines = []
    for other in others:
        cells = [difference(lead(results[setting], method, other, measure)) for setting in shown]
        if set(cells) != {"-"}:
            lines.append(f"| `{method}` over `{other}`{own} | " + " | ".join(cells) + " |")
    return lines


def known_domains(found: Mapping[str, Mapping[str, Json]]) -> str:
    """What domains.py found: accuracy of each domain's images under the prompts of each, by preset
    and partition.

    Args:
        found: method -> partition -> what `ask` returned.
    """
    lines, columns = [], []
    for method, partitions in found.items():
        if preset_of(method) != method:
            continue
        for partition, asked in partitions.items():
            for domain, scores in asked["accuracy"].items():
                columns = list(scores)
                cells = [percent(scores[column]) for column in columns]
                lines.append([f"`{method}`, {partition}", domain, *cells])
    names = (f"under those of {name}" for name in columns[:-1])
    return "\n".join(table(["", "images of", *names, *columns[-1:]], lines)).replace("|  |", "| |")


def selecting_together(found: Mapping[str, Mapping[str, Json]]) -> str:
    """What domains.py found: accuracy by how many images of a domain select together.

    Args:
        found: method -> partition -> what `ask` returned.
    """
    asked = {
        f"`{method}`, {partition}": each["together"]
        for method, partitions in found.items()
        for partition, each in partitions.items()
    }
    numbers = list(next(iter(asked.values())))
    lines = [[name, *map(percent, together.values())] for name, together in asked.items()]
    return "\n".join(table(["images that select together", *numbers], lines))


def recognised(found: Mapping[str, Mapping[str, float]]) -> str:
    """What domains.py found: share of images whose query is nearest to their own domain's.

    Args:
        found: kind of query -> domain -> share.
    """
    names = list(next(iter(found.values())))
    lines = [[kind, *(percent(shares[name]) for name in names)] for kind, shares in found.items()]
    return "\n".join(table(["query", *names], lines))


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
    adjusted = [each for each in grid.ADJUSTED if preset_of(each) in grid.WITHOUT_KEYS]
    rivals = {"pfpt": grid.WITHOUT_KEYS, grid.ADJUSTED_PFPT: (*grid.WITHOUT_KEYS, *adjusted)}
    lines = []
    for method, setting in itertools.product(rivals, grid.GOALS):
        leads = {
            other: found
            for other in rivals[method]
            if (found := lead(results.get(setting, {}), method, other)) is not None
            and found.seeds >= 3
        }
        if leads:
            lines.append([f"`{method}`", setting, *judge(grid.GOALS[setting], leads)])
    head = ("method", "setting", "goal", "smallest lead", "over", "clear of", "met")
    return "\n".join(table(head, lines))


def judge(goal: float | None, leads: Mapping[str, Paired]) -> list[str]:
    """How a goal stands.

    Args:
        goal: as in `grid.GOALS`.
        leads: over each rival.
    """
    least = min(leads, key=lambda other: leads[other].mean)
    clear = [other for other, found in leads.items() if found.mean - found.half_width > 0]
    if goal is None:
        met = all(found.mean + found.half_width >= 0 for found in leads.values())
    else:
        met = len(clear) == len(leads) and leads[least].mean >= goal
    return [
        "not worse" if goal is None else f"+{100 * goal:.0f}" if goal else "> 0",
        difference(leads[least]),
        f"`{least}`",
        f"{len(clear)} of {len(leads)}: " + (", ".join(f"`{each}`" for each in clear) or "none"),
        "yes" if met else "no",
    ]


def rate_lines(store: Store) -> list[str]:
    """Validation accuracy of every scale that was tried; the chosen one stands out."""
    lines = []
    cells = grid.rate_cells(grid.final_cells())
    for setting, method in dict.fromkeys((cell.setting, cell.method) for cell in cells):
        tried = tried_scales(setting, method, store)
        if not tried:
            continue
        lines.append([setting, method, *rate_cells(tried)])
    return table(["setting", "method", *(f"x {scale:g}" for scale in grid.ALL_SCALES)], lines)


def among(rows: Sequence[Summary], settings: Sequence[str]) -> list[Summary]:
    """Those of some settings."""
    return [row for row in rows if row.setting in settings]


def page_tables(
    results: Results, rows: Sequence[Summary], references: Mapping[str, Json]
) -> dict[str, str]:
    """The tables that stand in the page, by the name of their marks.

    Args:
        results: from `read_results`.
        rows: from `summarise`, compared with FedAvg-PT.
        references: as for `overview`.
    """
    plain = [setting for setting in grid.SETTINGS if setting.startswith("domains_plain")]
    mains = [setting for setting in grid.SETTINGS if setting not in plain]
    both_heads = (*grid.OTHER_SETTINGS, *grid.ABLATION_SETTINGS)
    compared = [each for each in grid.MAIN if each not in ("pfpt", "fedavg_pt")]
    return {
        "overview": "\n".join(
            [
                overview(among(rows, mains), grid.MAIN, references),
                *over_others(only(results, mains), "pfpt", compared),
                *over_others(only(results, mains), "pfpt", ["pfedpg"], "own"),
            ]
        ),
        "goals": goals(results),
        "plain": overview(among(rows, plain), grid.FIVE_SEEDS),
        "others": "\n".join(
            [
                overview(among(rows, both_heads), ("fedavg_pt", *grid.OTHERS)),
                *over_others(only(results, both_heads), "pfpt", (*grid.PLUS, "centralised")),
            ]
        ),
        **changed_tables(results),
    }


def only(results: Results, settings: Sequence[str]) -> Results:
    """Those of some settings."""
    return {setting: results[setting] for setting in settings if setting in results}


def changed_tables(results: Results) -> dict[str, str]:
    """The tables in which a method that is changed is compared with itself as it was."""
    to_preset = summarise(results, preset_of)
    to_changed = summarise(results, changed_from)
    adjusted = [each for method in grid.ADJUSTED for each in (preset_of(method), method)]
    alone = list(
        dict.fromkeys(each for method in grid.ALONE for each in (preset_of(method), method))
    )
    ablated = only(results, grid.ABLATION_SETTINGS)
    return {
        "one domain": overview(
            among(to_changed, grid.ONE_DOMAIN_SETTINGS),
            ("pfpt", *grid.ONE_DOMAIN, "fedavg_pt_plus", "fedavg_pt", "head_only"),
        ),
        "heads": overview(among(to_preset, grid.PROBE_SETTINGS), ("head_only", *grid.PROBES)),
        "adjusted": "\n".join(
            [
                overview(among(to_preset, grid.ADJUSTED_SETTINGS), (*adjusted, "fedcof")),
                *over_others(
                    only(results, grid.ADJUSTED_SETTINGS),
                    grid.ADJUSTED_PFPT,
                    (*adjusted[2:], "fedcof"),
                ),
            ]
        ),
        "alone": "\n".join(
            [
                overview(among(to_preset, grid.ABLATION_SETTINGS), (*alone, "fedavg_pt", "fedcof")),
                *over_others(ablated, grid.ALONE_PFPT, (*grid.WITHOUT_KEYS, grid.ALONE_PLUS)),
                *over_others(ablated, grid.WHITENED_PFPT, (grid.WHITENED_PLUS,)),
            ]
        ),
        "ablations": overview(
            among(to_changed, grid.ABLATION_SETTINGS),
            ("pfpt", grid.NO_MATCHING, *grid.ABLATIONS, *grid.DIAGNOSTICS),
        ),
    }


def detail_tables(store: Store, results: Results, bounds: Json) -> dict[str, str]:
    """The smaller tables of the page, by the name of their marks.

    Args:
        store: has the runs that chose learning rates.
        results: from `read_results`.
        bounds: what bounds.py found.
    """
    return {
        "takeaways": details.takeaways(results, bounds["frozen head"]),
        "spread": details.spread(results),
        "by rate": details.by_rate(store),
        "own images": details.own_images(results),
        "pools": details.pools(results),
        "known groups": details.known_groups(results, bounds, "domains_frozen"),
        "known groups, shared head": details.known_groups(results, bounds, "domains_shared"),
        "head bounds": details.head_bounds(bounds),
    }


def draw(store: Store, images: Path, results: Results, rows: Sequence[Summary]) -> None:
    """All figures of what has been run.

    Args:
        store: has the prompts of each round.
        images: where the figures go.
        results: from `read_results`.
        rows: from `summarise`.
    """
    images.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["font.size"] = 9
    pictures = {"methods": accuracy_figure(rows), "methods_pool": pool_figure(results)}
    for setting in (f"domains_frozen/{partition}" for partition in grid.PARTITIONS):
        picture = path_figure(store.pools(setting), setting)
        if picture is not None:
            pictures[f"methods_path_{setting.split('/')[1]}"] = picture
    for name, picture in pictures.items():
        picture.savefig(images / f"{name}.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--tables", type=Path, default=DOCS / "benchmark-tables.md")
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--bounds", type=Path, default=RESULTS / "methods_bounds.json")
    parser.add_argument("--domains", type=Path, default=RESULTS / "methods_domains.json")
    parser.add_argument("--page", type=Path, default=DOCS / "benchmark.md")
    arguments = parser.parse_args()
    store = Store(arguments.results)
    results = read_results(store)
    if not results:
        raise SystemExit(f"no results in {arguments.results}: run make bench-methods first")
    rows = summarise(results)
    arguments.tables.parent.mkdir(parents=True, exist_ok=True)
    arguments.tables.write_text(markdown(rows, rate_lines(store)), encoding="utf-8")
    bounds, asked = read_json(arguments.bounds), read_json(arguments.domains)
    pages = page_tables(results, rows, bounds["frozen head"])
    pages |= detail_tables(store, results, bounds)
    asked.pop("machine")
    pages["recognised"] = recognised(asked.pop("recognised"))
    pages["domains"] = known_domains(asked)
    pages["together"] = selecting_together(asked)
    for name, lines in pages.items():
        put_between(arguments.page, name, lines)
    draw(store, arguments.images, results, rows)
    print(f"{sum(row.seeds for row in rows)} runs in {arguments.tables}")


if __name__ == "__main__":
    main()
