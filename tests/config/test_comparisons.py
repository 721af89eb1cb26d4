"""A comparison is the experiment that the file and the command line say, with another method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedprompt.config import Sources, compose, conf_root
from fedprompt.config import layers as config_layers
from fedprompt.config.layers import flatten, rival
from fedprompt.core.errors import ConfigError
from fedprompt.experiment import plan_resume

PRESETS: dict[str, dict[str, Any]] = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((conf_root() / "method").glob("*.yaml"))
}
FILES: dict[str, dict[str, Any]] = {}
"""Those of `conf/`, read once for all tests."""
SAID: dict[str, Any] = {
    "seed": 5,
    "rounds": 7,
    "eval_every": 3,
    "eval_clients": "never",
    "note": "said",
    "data": {"name": "domains", "difficulty": 0.25},
    "partition": {"name": "quantity", "alpha": 3.0},
    "model": {"backbone": "nano_promptable"},
    "head": {"lr": 0.7, "hidden": 9, "dropout": 0.25},
    "prompts": {"count": 3, "pool": 9, "lr": 0.5, "init_std": 0.1, "query": "cls"},
    "clients": {"count": 30, "per_round": 4, "epochs": 2, "batch_size": 8},
    "cache": {"verify": True},
    "runtime": {"name": "serial", "threads": 1},
}
"""A value for keys of every kind, none of them a default."""
ENTRY_OPTIONS = {
    "fedopt_pt": ("aggregator", "lr"),
    "pfpt": ("aggregator", "patience"),
    "gmm_pt_plus": ("aggregator", "restarts"),
    "fedprox_pt": ("objective", "mu"),
    "fedncm": ("objective", "ridge"),
    "lora_fedavg": ("tuning", "rank"),
    "adapter_fedprox": ("tuning", "width"),
    "pfedpg": ("generator", "descriptor_std"),
}
"""An option of a plug-in of each of some methods."""


def keys(tree: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """Values by their path; sections have no sections in them."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update({(key, name): item for name, item in value.items()})
        else:
            flat[(key,)] = value
    return flat


def expected(method: str, rates_are_said: bool) -> dict[tuple[str, ...], Any]:
    """What was said, but for what the method's preset sets."""
    own = keys(PRESETS[method])
    return {
        path: value if path not in own or (rates_are_said and path[-1] == "lr") else own[path]
        for path, value in keys(SAID).items()
    }


@pytest.mark.parametrize("by_file", [True, False], ids=["method of the file", "method=LEAD"])
@pytest.mark.parametrize("said_by_file", [True, False], ids=["in the file", "in overrides"])
@pytest.mark.parametrize("lead", PRESETS)
def test_what_is_said_holds_for_every_rival(lead: str, said_by_file: bool, by_file: bool) -> None:
    experiment: dict[str, Any] = {**(SAID if said_by_file else {})}
    command: dict[str, Any] = {**({} if said_by_file else SAID)}
    (experiment if by_file else command)["method"] = lead
    sources = Sources(experiment, command, FILES)
    leading = keys(flatten(sources))
    wins = by_file or not said_by_file
    for path, value in keys(SAID).items() if wins else expected(lead, False).items():
        assert leading[path] == value, path
    for method in PRESETS:
        got = keys(flatten(rival(sources, method)))
        for path, value in expected(method, rates_are_said=not said_by_file).items():
            assert got[path] == value, (method, path)


@pytest.mark.parametrize("lead", ENTRY_OPTIONS)
def test_options_of_a_plug_in_hold_where_it_is_in_use(lead: str) -> None:
    group, option = ENTRY_OPTIONS[lead]
    sources = Sources({"method": "head_only"}, {"method": lead, group: {option: 11}}, FILES)
    entry = flatten(sources)[group]["name"]
    assert flatten(sources)[group][option] == 11
    users = []
    for method in PRESETS:
        got = flatten(rival(sources, method))[group]
        assert (got.get(option) == 11) == (got["name"] == entry), method
        users += [method] if got["name"] == entry else []
    assert lead in users and len(users) < len(PRESETS)


def test_what_the_lead_brings_along_is_no_rivals() -> None:
    """Every rival is the same whichever method leads."""
    for method in PRESETS:
        alone = flatten(Sources({}, {"method": method}, FILES))
        for lead in PRESETS:
            got = flatten(rival(Sources({}, {"method": lead}, FILES), method))
            assert {**got, "compare": None} == {**alone, "compare": None}, (lead, method)


def test_an_aggregator_on_the_command_line_is_for_the_lead() -> None:
    config = compose("digits", ["aggregator=server_opt", "aggregator.lr=0.5"])
    assert config.aggregator.name == "server_opt"
    names = [config.with_method(method).aggregator.name for method in ("pfpt", "gmm_pt")]
    assert names == ["pfpt", "gmm"]
    assert config.with_method("fedopt_pt").aggregator.options.lr == 0.5  # it has this plug-in
    tuned = compose("digits", ["tuning=lora", "tuning.rank=2"])  # no preset of theirs says it
    assert {tuned.with_method(m).tuning.name for m in tuned.compare} == {"lora"}


# As it was found


def test_rates_and_pool_of_the_paper_hold_when_scaffold_leads() -> None:
    config = compose("paper/cifar100_alpha_0.1", ["method=scaffold_pt"])
    assert (config.prompts.lr, config.head.lr) == (0.3, 0.1)
    for method in config.compare:
        other = config.with_method(method)
        rates = (0.3, 0.1) if method == "scaffold_pt" else (1e-4, 1e-4)
        assert (other.prompts.lr, other.head.lr) == rates
        assert other.prompts.pool == (20 if method.endswith("_plus") else None)


def test_the_pool_of_the_file_holds_when_a_method_without_pool_leads() -> None:
    config = compose("digits", ["method=fedavg_pt"])
    assert (config.prompts.pool, config.with_method("fedavg_pt_plus").prompts.pool) == (None, 10)


def test_rounds_that_are_said_hold_though_the_leads_preset_says_them_too() -> None:
    assert compose("digits", ["method=fedcof"]).with_method("fedavg_pt").rounds == 10
    config = compose("digits", ["method=fedcof", "rounds=1"])
    assert [config.with_method(method).rounds for method in config.compare] == [1, 1]
    assert compose("digits", ["rounds=3"]).with_method("fedcof").rounds == 1


def test_a_rival_that_cannot_take_what_was_said_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^compare: \w+: objective=scaffold: .*got 'adam'$"):
        compose("digits", ["clients.optimizer=adam", "compare=[scaffold_pt]"])


# What a run keeps


LED = ["method=scaffold_pt", "compare=[fedavg_pt_plus, fedopt_pt, head_only]", "prompts.init_std=1"]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The config.yaml of a run with comparisons."""
    path = tmp_path / "config.yaml"
    path.write_text(compose("digits", LED).to_yaml(), encoding="utf-8")
    return path


def test_a_resumed_comparison_is_the_same_though_conf_has_changed(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose("digits", LED)
    before = [config.with_method(method).tree() for method in config.compare]
    (kept.parent / "status.json").write_text(json.dumps({"state": "stopped"}))

    def changed(group: str, name: str) -> dict[str, Any]:
        raise AssertionError(f"{group}/{name} was read again")

    monkeypatch.setattr(config_layers, "load_group", changed)
    monkeypatch.setattr(config_layers, "read_yaml", lambda path: changed("conf", path.name))
    again = plan_resume(kept.parent).config
    assert again == config
    after = [again.with_method(method).tree() for method in again.compare]
    assert after == before


def test_other_actors_of_a_resumed_run_are_those_of_its_comparisons(kept: Path) -> None:
    (kept.parent / "status.json").write_text(json.dumps({"state": "interrupted"}))
    config = plan_resume(kept.parent, ["runtime=serial", "runtime.actors=1"]).config
    others = [config.with_method(method).runtime for method in config.compare]
    assert [(each.name, each.actors) for each in others] == [("serial", 1)] * 3


def test_a_kept_config_that_is_edited_holds_for_its_comparisons(kept: Path) -> None:
    text = kept.read_text(encoding="utf-8")
    kept.write_text(text.replace("rounds: 10", "rounds: 4", 1), encoding="utf-8")
    config = compose(kept, ["clients.epochs=1"])
    assert (config.rounds, config.prompts.lr) == (4, 0.3)
    other = config.with_method("fedavg_pt_plus")
    assert (other.rounds, other.clients.epochs) == (4, 1)
    assert (other.prompts.lr, other.prompts.init_std, other.prompts.pool) == (0.01, 1.0, 10)


@pytest.mark.parametrize(
    "override", ["head.lr=0.003", "aggregator=server_opt", "model=nano_promptable"]
)
def test_overrides_on_a_kept_config_hold_as_on_the_experiment(
    override: str, tmp_path: Path
) -> None:
    """Though the value is the leading method's already, or the file has every option."""
    path = tmp_path / "config.yaml"
    path.write_text(compose("digits", ["compare=[]"]).to_yaml(), encoding="utf-8")
    kept, config = compose(path, [override]), compose("digits", ["compare=[]", override])
    assert kept == config
    for method in ("scaffold_pt", "fedopt_pt"):
        assert kept.with_method(method) == config.with_method(method)


def test_another_method_on_a_kept_config_inherits_nothing_from_the_runs_own(kept: Path) -> None:
    again = compose(kept, ["method=fedavg_pt_plus"])
    assert again == compose("digits", [*LED, "method=fedavg_pt_plus"])


def test_what_a_program_changes_holds_for_the_comparisons() -> None:
    """As the sweep sets the seed of a trial, and a run the paths of its files."""
    config = dataclasses.replace(compose("digits", LED), seed=9)
    model = dataclasses.replace(config.model, backbone="/full/path.safetensors")
    config = dataclasses.replace(config, model=model)
    other = config.with_method("fedopt_pt")
    assert (other.seed, other.model.backbone) == (9, "/full/path.safetensors")
    assert other.aggregator.options.lr == 0.01
    assert compose(yaml.safe_load(other.to_yaml())) == other


def test_sources_are_sections_and_no_option() -> None:
    with pytest.raises(ConfigError, match=r"^sources.files.default: expected a section .* got 3$"):
        compose({"sources": {"files": {"default": 3}}})
    with pytest.raises(ConfigError, match=r"^sources: .* no option"):
        compose("digits", ["sources.command.rounds=3"])


def test_a_comparison_does_not_claim_the_folder_of_the_leading_run() -> None:
    config = compose("digits", ["run_dir=runs/mine"])
    assert (config.run_dir, config.with_method("fedavg_pt").run_dir) == ("runs/mine", None)
