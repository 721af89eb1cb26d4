"""What the pages quote, computed from the results; `quotes` compares.

A function for each page gives the figures of each section. `by hand` marks those that no committed
file holds: single observations, and numbers that are settings.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

from benchmarks.harness import RESULTS, Json, half_up, read_json
from benchmarks.methods import grid
from benchmarks.methods.results import Store
from benchmarks.methods.summary import Results, lead, read_results, summarise
from benchmarks.methods.text import difference, percent, points
from fedprompt.models.nano.network import EMBEDDED, read_card

Figures = dict[str, list[str]]
Rows = Mapping[tuple[str, str], str]
PARTITIONS = {"dirichlet_0.5": r"0\.5", "dirichlet_0.1": r"0\.1", "imbalance": r"imbalance"}
SETTINGS = [
    *("0.5", "0.1", "0.3", "0.003", "0.01", "0.03", "99", "95"),  # Dirichlet, scales, skew, level
    *("3.10", "3.11", "3.12", "2502.19752"),  # Python, and arXiv
]
"""Numbers that are no results."""


@functools.cache
def results() -> Results:
    """Of the methods benchmark."""
    return read_results(Store())


@functools.cache
def document(name: str) -> Json:
    """One of the JSON documents."""
    return read_json(RESULTS / f"{name}.json")


@functools.cache
def accuracy(setting: str, method: str, measure: str = "accuracy") -> str:
    """Percent with interval.

    Args:
        setting: task and partition.
        method: which.
        measure: one of `summary.MEASURES`.
    """
    row = next(r for r in summarise({setting: results()[setting]}) if r.method == method)
    return points(row.means[measure])


def gain(setting: str, method: str, other: str, measure: str = "accuracy") -> str:
    """Difference in points with interval, signed.

    Args:
        setting: task and partition.
        method: which.
        other: what is taken away.
        measure: one of `summary.MEASURES`.
    """
    found = lead(results()[setting], method, other, measure)
    return re.sub(r" \(p .*\)", "", difference(found))


def whole(text: str) -> str:
    """A figure without decimals and interval.

    >>> whole("66.9 ± 1.9"), whole("-8.5")
    ('67', '-8')
    """
    return f"{float(text.split(' ')[0]):.0f}"


def frozen(partition: str) -> str:
    """A setting with the frozen head."""
    return f"domains_frozen/{partition}"


def bare_head() -> str:
    """The frozen head without prompts."""
    return percent(document("methods_bounds")["frozen head"]["no prompts"]["test"])


# README.md

METHOD_ROWS = {
    r"PFPT": "pfpt",
    r"PFPT.*logit.?adjusted.*": grid.ADJUSTED_PFPT,
    r"FedAvg-PT": "fedavg_pt",
    r"FedAvg-PT\+.*": "fedavg_pt_plus",
    r"FedCOF.*": "fedcof",
}
"""First cell of a row -> the method."""


def readme_rows() -> Rows:
    """The table of the frozen head."""
    found = {
        (row, column): accuracy(frozen(partition), method)
        for row, method in METHOD_ROWS.items()
        for partition, column in PARTITIONS.items()
    }
    found |= {(r"the frozen head without prompts", c): bare_head() for c in PARTITIONS.values()}
    return found


def readme() -> Figures:
    """Wherever they stand: the page may be worded anew."""
    alone, plus_alone = "pfpt: each test image alone", grid.ALONE_PLUS
    found = [
        *readme_rows().values(),
        *(gain(frozen(p), "pfpt", "fedavg_pt") for p in PARTITIONS),
        *(gain(frozen(p), "pfpt", "fedavg_pt_plus") for p in PARTITIONS),
        *(gain(frozen(p), "pfpt", "fedcof") for p in PARTITIONS),
        *(gain(frozen(p), grid.ADJUSTED_PFPT, "pfpt") for p in PARTITIONS),
        *(gain(frozen(p), grid.ADJUSTED_PFPT, "fedcof") for p in PARTITIONS),
        *(gain(frozen(p), "fedavg_pt + logit adjustment", "fedavg_pt") for p in PARTITIONS),
        *(accuracy(frozen(p), alone) for p in grid.PARTITIONS_OF_OTHERS),
        *(accuracy(frozen(p), grid.ALONE_PFPT) for p in grid.PARTITIONS_OF_OTHERS),
        *(gain(frozen(p), grid.ALONE_PFPT, "pfpt") for p in grid.PARTITIONS_OF_OTHERS),
        *(gain(frozen(p), grid.ALONE_PFPT, plus_alone) for p in grid.PARTITIONS_OF_OTHERS),
        *(
            gain(frozen(p), grid.WHITENED_PFPT, grid.WHITENED_PLUS)
            for p in grid.PARTITIONS_OF_OTHERS
        ),
        *(gain(frozen(p), "pfpt", "pfpt: no selection") for p in grid.PARTITIONS_OF_OTHERS),
        *(accuracy(f"domains_shared/{p}", m) for p in PARTITIONS for m in ("pfpt", "head_only")),
        *(gain(f"domains_shared/{p}", "pfpt", "head_only") for p in PARTITIONS),
        *(accuracy(f"digits/{p}", m) for p in PARTITIONS for m in ("pfpt", "fedavg_pt")),
    ]
    return {"*": [*found, *map(whole, filter(_is_number, found)), *SETTINGS, *_fast()]}


def _is_number(text: str) -> bool:
    return bool(re.match(r"[+-]?\d", text)) and "," not in text and not re.match(r"\d+-", text)


def _fast() -> list[str]:
    """What README may say about speed."""
    cases = document("speed")["cases"]
    return [
        f"{cases['round']['ratio']['map']['wall_least']:.0f}",
        f"{cases['local']['ratio']['wall_least']:.1f}",
        f"{cases['workers']['serial_over_ray']['wall_least']:.2f}",
    ]


# docs/benchmark.md


def benchmark() -> Figures:
    """What stands outside the generated tables."""
    heads = document("methods_bounds")["frozen head"]
    probes = document_probes()
    keyed = accuracy("digits/imbalance", "pfpt + keyed selection", "own")
    return {
        "*": SETTINGS,
        "Protocol": ["10", "19"],  # 19: by hand
        "What should be known first": ["1.1"],  # parameters of the backbone, in millions
        "On one domain": [keyed, "68.9", "90.0", "87.8", "95.2"],  # the last four by hand
        "The head's optimiser": ["32"],  # by hand
        "Without the clients' class shares": [  # by hand
            *("56.0", "54.7", "56.6", "44.6", "43.7", "43.8", "43.6", "42.8", "42.1", "42.3"),
            *("49.7", "45.7", "35.4"),
        ],
        "Each test image alone": [
            gain(frozen("dirichlet_0.5"), grid.ALONE_PFPT, grid.ALONE_PLUS),
        ],
        "Other methods, and bounds": [gain(frozen("dirichlet_0.5"), "pfpt", "centralised")],
        "What prompts and selection know": shared_by_clients(),
        "What limits PFPT": [
            *(percent(score["test"]) for score in heads.values()),
            learned_centrally("per domain"),
            whole(learned_centrally("no prompts")),
            *probes,
            *until_origin_odds(),
        ],
        "What is not measured": [".63", ".57", ".62", ".60", ".59"],  # by hand
    }


def shared_by_clients() -> list[str]:
    """Least and most share of prompts that two clients of one domain have in common, PFPT."""
    asked = document("methods_domains")["pfpt"]
    shares = [whole(f"{100 * each['clients']['same domain']}") for each in asked.values()]
    return [f"{min(shares)}", f"{max(shares)}"]


def learned_centrally(variant: str) -> str:
    """From promptable.json, in percent."""
    found = document("promptable")["summary"]["nano_promptable"][variant]["all"]
    return f"{100 * found['mean']:.1f} ± {100 * found['ci95']:.1f}"


def document_probes() -> list[str]:
    """Linear probes: of the shipped backbone in backbone.md, of the other by hand."""
    return [".690", ".751", ".704", ".769"]


def until_origin_odds() -> list[str]:
    """By hand: runs before a default changed, which the tables no longer hold."""
    return [
        *("65.9", "59.2", "59.9", "7.1 ± 2.9", "-0.4 ± 4.9"),
        *("51.6", "60.1", "56.2", "58.3", "61.0", "60.2", "60.4", "64.2", "65.1", "63.4", "65.1"),
        *("66.9", "64.8", "67.0", "59.7", "60.1", "55.1", "54.8"),
    ]


# docs/performance.md


def performance() -> Figures:
    """What stands outside the generated tables."""
    cases = document("speed")["cases"]
    phases = cases["phases"]["cpu_milliseconds_per_image"]["fedprompt"]
    blocks = (phases["blocks forward"] + phases["backward"]) / phases["whole"]
    loads = [load for case in cases.values() for load in case["load"]]
    return {
        "*": [*SETTINGS, "2.5"],  # a goal
        "Takeaways": _fast(),
        "How it was measured": [f"{min(loads):.1f}", f"{max(loads):.0f}"],
        "One client, image by image": [f"{100 * blocks:.0f}"],
        # Arithmetic that the page spells out, and by hand.
        "Why 2.5 times is out of reach": ["54", "0.86", f"{(17 + 54) / (54 * 0.86):.1f}", "1.7"],
        "Packed clients": ["14", f"{1 / (1 - 0.14):.2f}", "6", "10", "100"],  # 6, 10, 100: by hand
    }


# docs/backbone.md


def backbone() -> Figures:
    """All cells of the table, and the text below it."""
    summary = document("promptable")["summary"]
    cells, gains = [], []
    for variants in summary.values():
        for variant, scores in variants.items():
            sign = "+" if variant.endswith("minus shared") else ""
            for each in scores.values():
                cells.append(f"{each['mean']:{sign}.3f} ± {each['ci95']:.3f}")
                if sign:
                    gains.append(f"{100 * each['mean']:.1f} ± {100 * each['ci95']:.1f}")
    probes = [".690", ".688", ".692", ".751"]  # the table of probes, by hand
    chance = [f"{1 / classes:.2f}".lstrip("0") for classes in (10, 7)]
    measured = [f"{value:.3f}" for name in EMBEDDED for value in numbers_in(read_card(name))]
    return {
        "Do prompts matter?": [*cells, *gains, *probes, *SETTINGS],
        "Linear probes": [*measured, *chance],
    }


def numbers_in(card: object) -> Iterator[float]:
    """All fractions that a card of weights holds, at any depth."""
    if isinstance(card, dict):
        for value in card.values():
            yield from numbers_in(value)
    elif isinstance(card, float):
        yield card


# docs/cluster.md


def cluster_rows() -> Rows:
    """Rounds per second, and their ratio to serial."""
    names = {
        "serial": r"serial",
        "ray_1_actor": r"Ray, 1 actor",
        "ray_2_actors": r"Ray, 2 actors",
        "ray_2_nodes_1_actor_each": r"Ray, 2 nodes.*",
    }
    speed = document("cluster")["rounds_per_second"]
    found = {(row, r"^rounds per second"): f"{speed[key]:.2f}" for key, row in names.items()}
    for key, row in itertools.islice(names.items(), 1, None):
        found[row, r"^against serial"] = f"{speed[key] / speed['serial']:.2f}"
    steps = {
        r"driver up.*": "driver_up_data_read_cache_opened",
        r"client actors up": "actors_up",
        r"\*\*training starts\*\*": "until_training",
    }
    starts = {r"^Ray started": ("new_local_ray", 1), r"^second": ("second_run_on_live_ray", 2)}
    for row, step in steps.items():
        for column, (start, places) in starts.items():
            places = 2 if step == "actors_up" else 1 if step == "until_training" else places
            found[row, column] = f"{document('cluster')['startup_seconds'][start][step]:.{places}f}"
    return found


def cluster() -> Figures:
    """All figures of the section."""
    measured = document("cluster")
    starts = measured["startup_seconds"].values()
    found = [f"{each[step]:.{places}f}" for each in starts for step in each for places in (1, 2)]
    for each in starts:
        found.append(f"{each['until_training'] + each['first_round']:.1f}")
    for killed in measured["recovery_seconds"].values():
        found += [f"{killed['round_with_kill']:.1f}", f"{killed['median_of_others']:.1f}"]
    found += cluster_rows().values()
    faster = document("speed")["cases"]["workers"]["serial_over_ray"]["wall_least"]
    return {"Figures": [*found, f"{faster:.1f}", *SETTINGS]}


# docs/pfpt.md


def share(value: float) -> str:
    """Three decimals; without a leading zero, as the page writes it.

    >>> share(0.9962), share(1.0)
    ('.996', '1.000')
    """
    text = half_up(abs(value), ".001").removeprefix("0")
    return f"-{text}" if value < 0 else text


def planted_case(sweep: str, noise: float, method: str) -> Json:
    """One method's figures.

    Args:
        sweep: of planted.json.
        noise: the case.
        method: which.
    """
    cases = document("planted")["sweeps"][sweep]["cases"]
    found: Json = next(case["methods"][method] for case in cases if case["value"] == noise)
    return found


def pfpt_rows() -> Rows:
    """Planted noise, by row and column."""
    found = {}
    for noise in (1.25, 1.5, 2, 3, 4):
        row = re.escape(f"{noise:g}")
        for column, sweep in {"all prompts": "noise_full", "subsets": "noise_subsets"}.items():
            figures = planted_case(sweep, noise, "map")
            text = share(figures["ari"]["mean"])
            if noise <= 2:
                text += f" ({100 * figures['exact_count']:.0f} %)"
            found[row, rf"map.*{column}"] = text
    return found


def pfpt() -> Figures:
    """Figures of the evidence that stand in tables."""
    planted = document("planted")
    noises = [
        figure
        for sweep in ("noise_full", "noise_subsets")
        for case in planted["sweeps"][sweep]["cases"]
        for method in case["methods"].values()
        for figure in _agreement(method)
    ]
    speed = planted["speed"]
    seconds = [each["seconds"] for each in speed["map"]]
    return {
        "Planted correspondences": [
            *noises,
            *(f"{case['value']:g}" for case in planted["sweeps"]["noise_full"]["cases"]),
            *OTHER_PLANTED,
        ],
        "Speed": [
            *(f"{each:.2g}" for each in seconds),
            *(f"{each:.3f}" for each in seconds),
            f"{speed['released']['vectorised']['seconds']:.1f}",
            f"{speed['growth_exponent']:.2f}",
            *("2.1", "0.1"),  # by hand: the first aggregation of a run
            *SETTINGS,
        ],
        "Keys, drift and 200 rounds": [*_keyed(), *KEYED_SETTINGS],
        "Extensions": [*_extensions(), "1.5"],
    }


OTHER_PLANTED = [
    *("1.00", "0.2", "0.5", "1.000", ".999", ".000", ".12", ".15", ".918", ".81", ".72", ".004"),
    *("60", "100", "0", "85", "95", "0.05", "1.25", "1.5", "0.1"),
]
"""Sweeps beside the noise: not compared one by one."""
KEYED_SETTINGS = [".1", ".3", ".5", ".7", ".02", "0.5", "95"]
"""Of the worlds."""


def _agreement(method: Json) -> list[str]:
    """How one method did in one case."""
    if "ari" not in method:
        return []
    mean, half = method["ari"]["mean"], method["ari"]["ci95"] or 0.0
    exact = f"{100 * method['exact_count']:.0f}"
    return [share(mean), f"{share(mean)} ± {share(half)}", exact]


def _keyed() -> Iterable[str]:
    """ARI and pool of each world of keyed.json."""
    for worlds in document("keyed")["parts"].values():
        for world in worlds:
            ari, pool = world["summary"]["ari"], world["summary"]["pool"]
            yield f"{share(ari['mean'])} ± {share(ari['ci95'])}"
            yield f"{pool['mean']:.2f}"


def _extensions() -> Iterable[str]:
    """Default, value and difference of each measure of each option of extensions.json."""
    for effect in document("extensions")["effects"]:
        for name, found in effect["measures"].items():
            gain, half = found["difference"]["mean"], found["difference"]["ci95"]
            if name == "pool":
                yield from (f"{found['default']:.2f}", f"{found['value']:.2f}")
                yield f"{gain:.2f} ± {half:.2f}".replace("0.", ".")
                yield from (f"{found['default']:.1f}", f"{found['value']:.1f}")
            elif name != "milliseconds":
                yield from (share(found["default"]), share(found["value"]))
                yield f"{share(gain)} ± {share(half)}"
                yield f"{gain:.3f} ± {half:.3f}".replace("0.", ".")  # .0905 has two roundings


# docs/data.md


def data() -> Figures:
    """Partitions of a million samples, and the prefix cache."""
    cases, cache = document("partition")["cases"], document("cache")
    seconds = [case["seconds"] for case in cases]
    found = [f"{min(seconds):.2f}", f"{max(seconds):.1f}"]
    for case in cache["cases"].values():
        per = case["seconds_per_1000"]
        found += [half_up(value, places) for value in per.values() for places in (".01", ".001")]
        megabytes = [size / 1e3 / case["images"] for size in case["bytes"].values()]
        found += [f"{each:.1f}" for each in megabytes]
    for start in cache["start"]:
        states = [start[state] for state in ("empty", "warm", "warm_ray_up") if state in start]
        found += [half_up(each["rounds_begin"], ".1") for each in states]
    memory = [f"{row['proportional_mb']:.1f}" for row in cache["memory"]["rows"]]
    examples = [  # by hand: what `fedprompt partition` shows for three experiments
        *("0.208", "0.380", "5.96", "0.648", "0.752", "5.45", "0.885", "0.915", "1.09"),
    ]
    return {"The prefix cache": [*found, *memory], "Partitions": [*found, *examples], "*": SETTINGS}
