"""The tables of docs/performance.md, from the committed JSON: `python -m benchmarks.speed.page`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import DOCS, RESULTS, Json, half_up, put_between, read_json
from benchmarks.methods.text import table
from fedprompt.cli.bench import LARGE

SMALL = "nano, 6 blocks"


def tables(cases: Json) -> dict[str, str]:
    """By the name of their marks.

    Args:
        cases: of speed.json.
    """
    found = {
        "goals": goals(cases),
        "loops": loops(cases["loops"]),
        "packs": packs(cases["packs"]),
        "registered clients": registered(cases["flat"]),
        "memory": memory(cases["growth"]),
        **costs(cases["peak"]),
    }
    return {name: "\n".join(lines) for name, lines in found.items()}


def goals(cases: Json) -> list[str]:
    """What was wanted and what was measured; ratios are of the least times but where it says so."""
    whole, local = cases["round"]["ratio"], cases["local"]
    client, overhead = cases["overhead"]["client_milliseconds_wall"], cases["overhead"]
    serial, ray = overhead["round_milliseconds_serial"], overhead["round_milliseconds_ray"]
    bare, actors = cases["workers"]["serial_over_bare"], cases["workers"]["serial_over_ray"]
    rows = [
        [
            "whole round against the naive procedure, default matching",
            "30 ×",
            f"**{whole['map']['wall_least']:.0f} ×**",
        ],
        [
            "the same, with the variant that gives what the naive loop gives",
            "30 ×",
            f"**{whole['released']['wall_least']:.0f} ×**",
        ],
        [
            "local training against the naive procedure",
            "2.5 ×",
            f"**{local['ratio']['wall_least']:.1f} ×**, not reached",
        ],
        [
            "the same, all clients in one pack",
            "2.5 ×",
            f"{local['ratio_packed']['wall_least']:.1f} ×, not reached",
        ],
        [
            "framework around a client's steps, median",
            "10 ms",
            f"{client['outside_median']:.1f} ms",
        ],
        [
            "framework around a round under `serial`, median",
            "20 ms",
            f"{serial['median']:.0f} ms",
        ],
        [
            "the same under Ray, median (least)",
            "20 ms",
            f"{ray['median']:.0f} ms ({ray['least']:.0f}), not quite reached",
        ],
        [
            "serial runtime against a bare PyTorch loop on the cached tokens, median (least)",
            "1.10",
            f"**{bare['wall_median']:.2f}** ({bare['wall_least']:.2f})",
        ],
        [
            "Ray with 2 actors against serial, least (median)",
            "1.6 ×",
            f"**{actors['wall_least']:.2f} ×** ({actors['wall_median']:.2f})",
        ],
        *_others(cases),
    ]
    return table(["comparison", "goal", "measured"], rows)


def _others(cases: Json) -> list[list[str]]:
    """The same against Flower and against the machine."""
    flower, seconds = cases["flower"]["ratio"], cases["flower"]["seconds"]
    starts = {side: seconds[side]["start"]["median"] for side in ("fedprompt", "flower")}
    return [
        [
            "against Flower's engine, client by client, median round (least)",
            "3 ×",
            _median_and_least(flower["fedprompt"]["round"]) + ", not reached",
        ],
        [
            "against Flower's engine, `runtime.pack=5`, median round (least)",
            "3 ×",
            _median_and_least(flower["packed"]["round"]) + ", not reached",
        ],
        [
            "start-up against Flower's engine, medians",
            "1/2",
            f"{starts['fedprompt'] / starts['flower']:.2f} ({starts['fedprompt']:.1f} s against "
            f"{starts['flower']:.1f} s), not reached",
        ],
        [
            "a training step at ViT-B/32 width, share of the matmul peak",
            "50 %",
            f"**{_share(step_of(cases['peak'], LARGE))}**",
        ],
        [
            "the same at the width of nano",
            "50 %",
            " to ".join(_share(step) for step in _ends(cases["peak"])),
        ],
    ]


def _median_and_least(ratio: Json) -> str:
    return f"{ratio['median']:.1f} × ({ratio['least']:.1f})"


def _share(step: Json) -> str:
    return f"{100 * step['share']:.0f} %"


def _milliseconds(step: Json) -> str:
    return f"{step['cpu_milliseconds']:.0f}"


def step_of(peak: Json, backbone: str, prompts: int = 10, images: int = 16) -> Json:
    """One measured step.

    Args:
        peak: the case.
        backbone: its name there.
        prompts: how many.
        images: in the batch.
    """
    found: Json = next(
        step
        for step in peak["steps"]
        if (step["backbone"], step["prompts"], step["images"]) == (backbone, prompts, images)
    )
    return found


def _by_prompts(peak: Json) -> list[Json]:
    return [step_of(peak, SMALL, count) for count in (1, 5, 10, 20, 50)]


def _ends(peak: Json) -> list[Json]:
    """The steps of nano that are least and most near the peak, by number of prompts."""
    steps = sorted(_by_prompts(peak), key=lambda step: float(step["share"]))
    return [steps[0], steps[-1]]


def loops(case: Json) -> list[str]:
    """Milliseconds of a step by each loop."""
    names = {
        "trainer": "a new quiet `Trainer` for each client",
        "fabric": "Lightning Fabric",
        "fedprompt": "`client/loop.py`",
        "no hooks": "no hooks at all",
    }
    head, alone = (case[side]["milliseconds_per_step"] for side in ("pfpt", "head_only"))
    rows = [
        [text, half_up(head[name], ".1"), half_up(alone[name], ".01")]
        for name, text in names.items()
    ]
    return table(["milliseconds for one step", "prompts, 5 blocks", "head alone"], rows)


def packs(case: Json) -> list[str]:
    """CPU time that packs save, least times and medians."""

    def saved(side: str, size: str) -> str:
        seconds, one = case[side]["seconds"][size], case[side]["seconds"]["1"]
        shares = {
            f"{100 * (1 - seconds[name] / one[name]):.0f}" for name in ("cpu_least", "cpu_median")
        }
        return "-".join(sorted(shares, key=int)) + " %"

    rows = [[size, saved("pfpt", size), saved("head_only", size)] for size in ("2", "5", "10")]
    return table(["pack", "prompts, 5 blocks", "head alone"], rows)


def costs(case: Json) -> dict[str, list[str]]:
    """CPU time of a step by prompts, by blocks and batch, and by image size."""
    by_prompts = _by_prompts(case)
    others = {
        "3 blocks": step_of(case, "nano, 3 blocks"),
        "6 blocks": step_of(case, SMALL),
        "12 blocks": step_of(case, "nano, 12 blocks"),
        "6 blocks, batch of 4": step_of(case, SMALL, images=4),
        "batch of 64": step_of(case, SMALL, images=64),
    }
    sizes = case["image_size (ViT-Ti/16, 4 blocks)"]
    tokens = [(each["image_size"] // 16) ** 2 + 1 + 10 for each in sizes]
    large = step_of(case, LARGE)
    return {
        "cost of prompts": _steps(
            "nano ViT, 6 blocks, prompts", [str(each["prompts"]) for each in by_prompts], by_prompts
        ),
        "cost of blocks": _steps("nano ViT, 10 prompts", others, list(others.values())),
        "cost of sizes": table(
            [
                "image size (ViT-Ti/16, 4 blocks, 10 prompts)",
                *(str(each["image_size"]) for each in sizes),
            ],
            [
                ["tokens with prompts", *map(str, tokens)],
                ["ms", *map(_milliseconds, sizes)],
            ],
        ),
        "cost at full width": table(
            ["ViT-B/32 at 224, 10 prompts, batch of 16", ""],
            [
                ["CPU time of a step", f"{large['cpu_milliseconds'] / 1000:.1f} s"],
                ["share of the peak of one core", _share(large)],
            ],
        ),
    }


def _steps(name: str, head: Iterable[str], steps: Sequence[Json]) -> list[str]:
    return table(
        [name, *head],
        [["ms", *map(_milliseconds, steps)], ["share of the matmul peak", *map(_share, steps)]],
    )


def registered(case: Json) -> list[str]:
    """What a round costs by how many clients are registered."""
    sizes = list(case["against_100"])
    return table(
        ["registered clients", *(f"{int(size):,}" for size in sizes)],
        [
            [
                "time of a round against 100",
                *(f"{case['against_100'][size]['wall_least']:.2f}" for size in sizes),
            ],
            [
                "peak of new Python memory (kB)",
                *(f"{case['peak_new_python_kb'][size]:.0f}" for size in sizes),
            ],
        ],
    )


def memory(case: Json) -> list[str]:
    """Growth of private memory over many rounds."""
    grown = {side: case[side]["mb_per_100_rounds"] for side in ("serial", "ray")}
    return table(
        ["private memory", "MB for each 100 rounds"],
        [
            ["`serial`", f"{grown['serial']['process']:.2f}"],
            ["Ray, driver", f"{grown['ray']['DriverActor']:.2f}"],
            ["Ray, client actor", f"{grown['ray']['ClientActor']:.2f}"],
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--page", type=Path, default=DOCS / "performance.md")
    arguments = parser.parse_args()
    for name, lines in tables(read_json(arguments.results)["cases"]).items():
        put_between(arguments.page, name, lines)


if __name__ == "__main__":
    main()
