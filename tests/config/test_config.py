"""Experiments as files: layers, groups, round trips, errors of one line that say how to mend."""

from __future__ import annotations

import dataclasses
import importlib
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedprompt.config import (
    REGISTRIES,
    SECTIONS,
    ExperimentConfig,
    build,
    compose,
    conf_root,
    list_experiments,
)
from fedprompt.config import layers as config_layers
from fedprompt.core.errors import ConfigError
from fedprompt.runtime.base import available_cpus

CONF = conf_root()
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Write an experiment file and return its path."""

    def file(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return file


def refusal(*overrides: str, config: Any = "digits") -> str:
    """The message of the ConfigError that `compose` raises; it is one line."""
    with pytest.raises(ConfigError, match=r"^[^\n]+\Z") as caught:
        compose(config, overrides)
    return str(caught.value)


# Layers


def test_an_empty_file_is_the_default(write: Callable[[str], str]) -> None:
    config = compose(write(""))
    assert (config.name, config.rounds, config.method) == ("experiment", 10, "pfpt")
    assert (config.aggregator.name, config.prompts.selection) == ("pfpt", "all")
    assert compose({}) == config


@pytest.mark.parametrize(
    ("overrides", "selection"),
    [
        (["data=digits"], "all"),
        (["data=digits", "prompts.pool=20"], "keyed"),
        (["data=cifar100"], "all"),
        (["data=cifar100", "prompts.pool=20"], "keyed"),
        (["data=cifar100", "prompts.placement=pool"], "keyed"),
        (["data=domains"], "keyed"),
        (["data=fourdataset"], "keyed"),
        (["data=pacs"], "keyed"),
        (["data=domains", "prompts.placement=shallow"], "all"),
        (["data=domains", "prompts.mode=personal", "aggregator=mean"], "all"),
        (["data=imagefolder"], "all"),
        (["data=imagefolder", "data.csv=images.csv"], "keyed"),
        (["data=domains", "prompts.selection=l2p"], "l2p"),
        (["data=domains", "method=fedavg_pt"], "all"),
    ],
)
def test_selection_is_by_key_where_there_is_something_to_tell_apart(
    overrides: list[str], selection: str
) -> None:
    config = compose({}, overrides)
    assert config.prompts.selection == selection
    assert build(config.tree()) == config


def test_another_method_does_not_inherit_what_auto_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what the user chose it does."""
    load = config_layers.load_group

    def with_a_bare_one(group: str, name: str) -> dict[str, object]:
        return {"aggregator": "mean"} if name == "bare" else load(group, name)

    monkeypatch.setattr(config_layers, "load_group", with_a_bare_one)
    by_itself = compose({}, ["data=cifar100"])
    assert by_itself.prompts.selection == "all"
    assert by_itself.with_method("bare").prompts.selection == "keyed"  # as in default.yaml
    chosen = compose({}, ["data=cifar100", "prompts.selection=l2p"])
    assert chosen.with_method("bare").prompts.selection == "l2p"


def test_slips_of_a_program_are_clear_lines() -> None:
    with pytest.raises(ConfigError, match=r"a list of key=value, got the text 'rounds=3'; use \["):
        compose({}, "rounds=3")
    with pytest.raises(ConfigError, match="unknown config key '1'"):
        compose({1: 2})


def test_the_file_wins_over_its_method(write: Callable[[str], str]) -> None:
    # fedavg_pt: aggregator mean, selection all.
    config = compose(write("method: fedavg_pt\nprompts: {selection: l2p}\nrounds: 7\n"))
    assert config.rounds == 7
    assert config.aggregator.name == "mean"
    assert config.prompts.selection == "l2p"


def test_a_method_on_the_command_line_wins_over_the_file(write: Callable[[str], str]) -> None:
    file = write("method: pfpt\nprompts: {selection: l2p, count: 3}\naggregator: pfpt\n")
    config = compose(file, ["method=fedavg_pt"])
    assert (config.aggregator.name, config.prompts.selection) == ("mean", "all")
    assert config.prompts.count == 3  # no business of this method


@pytest.mark.parametrize("turn", [1, -1])
def test_other_overrides_win_over_the_method(turn: int) -> None:
    overrides = ["prompts.selection=l2p", "method=fedavg_pt", "aggregator=pfpt"][::turn]
    config = compose("digits", overrides)
    assert (config.method, config.aggregator.name) == ("fedavg_pt", "pfpt")
    assert config.prompts.selection == "l2p"


def test_the_last_of_two_overrides_wins() -> None:
    assert compose("digits", ["rounds=3", "rounds=4"]).rounds == 4


def test_a_section_without_lines_changes_nothing(write: Callable[[str], str]) -> None:
    config = compose(write("method: fedavg_pt\nprompts:\n  # count: 3\nclients:\n"))
    assert config.prompts.selection == "all"
    assert config.clients == compose({}).clients


def test_a_file_that_is_named_like_an_experiment_is_reached_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "digits").write_text("rounds: 99\n")
    assert compose(str(tmp_path / "digits")).rounds == 99
    assert compose(tmp_path / "digits").rounds == 99


# Groups


def test_a_group_is_picked_by_name() -> None:
    config = compose("digits", ["head=linear", "partition=iid", "model=nano_promptable"])
    assert config.head.name == "linear"
    assert config.partition.name == "iid"
    assert config.partition.tree() == {"name": "iid"}  # nothing is left of dirichlet
    assert config.model.backbone == "nano_promptable"


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize(
    ("overrides", "value"),
    [
        (["aggregator=pfpt", "aggregator.patience=3"], lambda c: c.aggregator.options.patience),
        (["aggregator={patience: 3}", "aggregator=pfpt"], lambda c: c.aggregator.options.patience),
        (["objective=proximal", "objective.mu=3"], lambda c: c.objective.options.mu),
        (["runtime=serial", "runtime.actors=3"], lambda c: c.runtime.actors),
        (["head=linear", "head.lr=3"], lambda c: c.head.lr),
    ],
)
def test_name_and_value_of_a_group_in_any_order(
    overrides: list[str], value: Callable[[ExperimentConfig], float], turn: int
) -> None:
    config = compose("digits", ["method=fedavg_pt", *overrides[::turn]])
    assert value(config) == 3


@pytest.mark.parametrize("turn", [1, -1])
def test_the_model_group_has_no_name_of_its_own(turn: int) -> None:
    overrides = ["model=nano_promptable", "model.backbone=mine.safetensors"][::turn]
    assert compose("digits", overrides).model.backbone == "mine.safetensors"
    assert compose({"model": {"name": "nano_promptable"}}).model.backbone == "nano_promptable"


def test_a_group_that_is_picked_wins_over_what_a_weaker_source_says() -> None:
    said = {"model": {"backbone": "nano", "resize": 30}, "head": {"mode": "shared", "lr": 0.5}}
    config = compose(said, ["model=nano_promptable", "head=frozen"])
    assert (config.model.backbone, config.model.resize) == ("nano_promptable", 30)
    assert (config.head.mode, config.head.lr) == ("frozen", 0.5)
    kept = compose({"head": {"name": "linear", "bias": True}}, ["head=linear"])
    assert kept.head.bias  # in use already: nothing changes


def test_a_mapping_changes_or_replaces_a_group() -> None:
    changed = compose("digits", ["partition={alpha: 0.1}"]).partition
    assert (changed.name, changed.options.alpha) == ("dirichlet", 0.1)
    same = compose("digits", ["partition.alpha=0.1", "partition={name: dirichlet}"]).partition
    assert same == changed
    assert compose("digits", ["partition={name: iid}"]).partition.name == "iid"


def test_another_runtime_keeps_the_threads_because_they_change_bits() -> None:
    file = {"runtime": {"name": "ray", "threads": 1, "actors": 3}}
    runtime = compose(file, ["runtime=serial"]).runtime
    assert (runtime.name, runtime.threads, runtime.actors) == ("serial", 1, 3)


# Values


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("clients.lr=1e-3", 0.001),
        ("clients.lr=1E3", 1000.0),
        ("clients.lr=2", 2.0),
        ("clients.lr=null", None),
        ("clients.lr=", None),
        ("clients={lr: 1e-3}", 0.001),
    ],
)
def test_numbers_and_null(override: str, value: float | None) -> None:
    assert compose("digits", [override]).clients.lr == value


def test_whole_numbers_stay_whole() -> None:
    config = compose("digits", ["rounds=3", "clients.lr=3"])
    assert type(config.rounds) is int
    assert type(config.clients.lr) is float


def test_lists() -> None:
    assert compose("digits", ["compare=[]"]).compare == ()
    assert compose("digits", ["compare=[head_only, pfpt]"]).compare == ("head_only", "pfpt")


@pytest.mark.parametrize(
    "text",
    ["7", "007", "1e5", "2024-01-01", "on", "no", "1_000", "a=b", "a: b", "#1", "@x", "[a", "ü/ö"],
)
def test_text_stays_as_it_was_typed(text: str) -> None:
    config = compose("digits", [f"run_dir={text}", f"name={text}"])
    assert (config.run_dir, config.name) == (text, text)


@pytest.mark.parametrize("text", ["", "null", "~"])
def test_no_run_dir(text: str) -> None:
    assert compose("digits", ["run_dir=somewhere", f"run_dir={text}"]).run_dir is None


def test_quotes_are_read_as_yaml() -> None:
    assert compose("digits", ["name='null'"]).name == "null"


# Round trip


def check_round_trip(config: ExperimentConfig, folder: Path) -> None:
    text = config.to_yaml()
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert compose(yaml.safe_load(text)) == config
    again = compose(path)
    assert again == config
    assert again.to_yaml() == text
    assert list(yaml.safe_load(text)) == [field.name for field in dataclasses.fields(config)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_comes_back(name: str, tmp_path: Path) -> None:
    config = compose(name)
    assert config.name == name
    first = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# fedprompt run {name}"
    check_round_trip(config, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_composes_and_comes_back(name: str, tmp_path: Path) -> None:
    config = compose("digits", [f"method={name}", "compare=[]"])
    assert config.method == name
    check_round_trip(config, tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["prompts.pool=9", "prompts.count=2", "clients.lr=1e-7", "seed=12345678901234567890"],
        ["method=fedavg_pt", "aggregator=pfpt", "aggregator.gamma=3e5", "head=linear"],
        ["objective=proximal", "objective.mu=1e-9", "partition=iid", "runtime=serial"],
        ["aggregator=mean", "prompts.count=1", "method=pfpt", "compare=[head_only]"],
        ["name=null", "run_dir=null", "name=1e5"],
        ["name=on", "run_dir=2024-01-01"],
        ["name=a: b # c", "run_dir=0x10"],
        ["name=Ωμέγα", "run_dir=runs/a=1/[b]"],
    ],
    ids=str,
)
def test_changed_values_come_back(overrides: list[str], tmp_path: Path) -> None:
    check_round_trip(compose("digits", ["compare=[]", *overrides]), tmp_path)


# Methods


def test_with_method_changes_the_method_alone() -> None:
    config = compose("digits", ["seed=3", "rounds=2", "partition.alpha=0.1", "prompts.count=4"])
    other = config.with_method("fedavg_pt")
    assert (other.name, other.method, other.compare) == ("digits/fedavg_pt", "fedavg_pt", ())
    assert (other.aggregator.name, other.prompts.selection) == ("mean", "all")
    assert other.prompts.count == 4
    same = ("seed", "rounds", "data", "partition", "clients", "model", "head", "runtime")
    for field in same:
        assert getattr(other, field) == getattr(config, field), field


def test_with_method_of_its_own_method_changes_no_value() -> None:
    config = compose("digits", ["compare=[]"])
    assert dataclasses.replace(config.with_method("pfpt"), name=config.name) == config


def test_a_comparison_that_cannot_work_is_refused_before_the_main_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "method" / "bad.yaml").write_text("aggregator: mean\nprompts: {cuont: 1}")
    monkeypatch.setattr("fedprompt.config.files.conf_root", lambda: tmp_path / "conf")
    message = refusal("compare=[bad]")
    assert message.startswith("compare: bad: unknown config key 'prompts.cuont'")


# Files of conf/


@pytest.mark.parametrize("group", [*REGISTRIES, "head", "model"])
def test_files_of_a_group_repeat_no_default(group: str) -> None:
    """Defaults stand in one place, the options' dataclasses."""
    for path in (CONF / group).glob("*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if group in REGISTRIES:
            assert content["name"] == path.stem
        name = content.pop("name", None)
        options = SECTIONS[group] if group in SECTIONS else REGISTRIES[group].entry(name).options
        defaults = {field.name: field.default for field in dataclasses.fields(options)}
        assert content.keys() <= defaults.keys()
        repeated = [key for key, value in content.items() if value == defaults[key]]
        assert repeated == [] or (group, path.stem, repeated) == ("model", "nano", ["backbone"])


@pytest.mark.parametrize("group", [*REGISTRIES, "head", "model"])
def test_every_file_of_a_group_can_be_picked(group: str) -> None:
    # What a file cannot do without.
    needs = {
        "closed_form": ["method=fedcof", "prompts.count=0"],
        "pfedpg": ["method=fedavg_pt"],
        **{rule: ["method=fedavg_pt"] for rule in ("median", "trimmed_mean", "geometric_median")},
    }
    for path in (CONF / group).glob("*.yaml"):
        overrides = ["compare=[]", f"{group}={path.stem}", *needs.get(path.stem, [])]
        config = compose("digits", overrides)
        if group != "model":
            name = yaml.safe_load(path.read_text(encoding="utf-8"))["name"]
            assert getattr(config, group).name == name


def test_a_config_of_before_there_were_defences_goes_on_without() -> None:
    tree = compose("quickstart", ["compare=[]", "rounds=7"]).tree()
    for group in ("defence", "attack"):
        del tree[group], tree["sources"]["files"][f"{group}/none"]
        del tree["sources"]["files"]["default"][group]
    config = compose(tree)
    assert (config.defence.name, config.attack.name, config.rounds) == ("none", "none", 7)
    assert config.with_method("fedavg_pt").defence.name == "none"


def test_default_yaml_holds_names_alone() -> None:
    content = yaml.safe_load((CONF / "default.yaml").read_text(encoding="utf-8"))
    assert content.keys() == {"method", "head", "model", *REGISTRIES}
    assert all(isinstance(value, str) for value in content.values())


# The registry behind the groups


def test_a_registry_imports_no_more_than_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = (
        "from dataclasses import make_dataclass\n"
        "from toolbox import tools\n"
        "tools.register('{0}', make_dataclass('Options', []))(lambda options: '{0}')\n"
    )
    files = {
        "__init__": "import fedprompt.core.registry as r\ntools = r.Registry('tool', 'toolbox')\n",
        "axe": register.format("file"),
        "drill": f"import nowhere_to_be_found\n{register.format('saw')}",
        "hammer": register.format("hammer"),
    }
    (tmp_path / "toolbox").mkdir()
    for name, text in files.items():
        (tmp_path / "toolbox" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    tools = importlib.import_module("toolbox").tools
    assert tools.create("hammer") == "hammer"
    assert "toolbox.axe" not in sys.modules
    assert tools.names() == ["file", "hammer"]
    with pytest.raises(ConfigError, match=r"^unknown tool 'saw': expected one of file, ") as caught:
        tools.entry("saw")
    expected = "; drill needs the package 'nowhere_to_be_found', which is not installed"
    assert str(caught.value).endswith(expected)
    for name in ("toolbox", "toolbox.axe", "toolbox.hammer"):
        monkeypatch.delitem(sys.modules, name)


# Errors


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("roundz=3", "roundz", "rounds"),
        ("client.count=3", "client", "clients"),
        ("clients.epoch=3", "clients.epoch", "clients.epochs"),
        ("prompts.cuont=3", "prompts.cuont", "prompts.count"),
        ("aggregator.patience_=3", "aggregator.patience_", "aggregator.patience"),
        ("partition.alfa=3", "partition.alfa", "partition.alpha"),
        ("data.sed=3", "data.sed", "data.seed"),
        ("runtime.actor=3", "runtime.actor", "runtime.actors"),
        ("head.dropuot=0", "head.dropuot", "head.dropout"),
        ("model.backbon=x", "model.backbon", "model.backbone"),
        ("alpha=0.1", "alpha", "partition.alpha"),
        ("actors=2", "actors", "runtime.actors"),
        ("per_round=2", "per_round", "clients.per_round"),
        ("clients={epoch: 3}", "clients.epoch", "clients.epochs"),
    ],
)
def test_unknown_key(override: str, key: str, nearest: str) -> None:
    message = refusal(override)
    assert message.startswith(f"unknown config key '{key}': expected one of ")
    assert message.endswith(f"; did you mean '{nearest}'?")


def test_unknown_key_in_a_file(write: Callable[[str], str]) -> None:
    message = refusal(config=write("clients:\n  cont: 3\n"))
    assert "'clients.cont'" in message
    assert "did you mean 'clients.count'?" in message
    assert "unknown config key '5'" in refusal(config=write("5: 3\n"))


def test_a_key_that_several_sections_have() -> None:
    message = refusal("lr=3")
    assert all(f"'{section}.lr'" in message for section in ("clients", "prompts", "head"))


def test_options_for_an_entry_that_has_none() -> None:
    message = refusal("partition=iid", "partition.alpha=3")
    assert (
        message
        == "unknown config key 'partition.alpha': this partition takes no options; remove it"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=abc", "rounds: expected an integer, got 'abc'"),
        ("rounds=2.5", "rounds: expected an integer, got 2.5"),
        ("rounds=2.0", "rounds: expected an integer, got 2.0"),
        ("rounds=true", "rounds: expected an integer, got true"),
        ("rounds=null", "rounds: expected an integer, got null"),
        ("rounds=[1]", "rounds: expected an integer, got [1]"),
        ("rounds.x=1", 'rounds: expected an integer, got {"x": 1}'),
        ("rounds=???", "rounds: expected an integer, got '???'"),
        ("clients.lr=[1]", "clients.lr: expected a number or null, got [1]"),
        ("clients.lr=fast", "clients.lr: expected a number or null, got 'fast'"),
        ("clients.lr.x=1", 'clients.lr: expected a number or null, got {"x": 1}'),
        ("clients.count=2.5", "clients.count: expected an integer, got 2.5"),
        ("runtime.actors=two", "runtime.actors: expected an integer or null, got 'two'"),
        ("partition.alpha=low", "partition.alpha: expected a number, got 'low'"),
        ("aggregator.patience=2.5", "aggregator.patience: expected an integer, got 2.5"),
        ("aggregator.shrink=maybe", "aggregator.shrink: expected true or false, got 'maybe'"),
        ("compare=mean", "compare: expected a list of names such as [a, b], got 'mean'"),
        ("compare=[[pfpt]]", 'compare: expected a list of names such as [a, b], got [["pfpt"]]'),
        ("clients=5", "clients: expected a section of 'key: value' lines, got 5"),
        ("prompts=[5]", "prompts: expected a section of 'key: value' lines, got [5]"),
        (
            "aggregator=[pfpt]",
            "aggregator: expected the name of a file in conf, or a section of 'key: value' lines, "
            'got ["pfpt"]',
        ),
        (
            "method=",
            f"unknown method 'null': expected one of {', '.join(METHODS)}",
        ),
    ],
)
def test_wrong_type(override: str, message: str) -> None:
    assert refusal(override) == message


def test_a_value_and_a_section_under_one_key() -> None:
    assert refusal("rounds=3", "rounds.x=3") == 'rounds: expected an integer, got {"x": 3}'
    assert refusal("compare=[]", "compare.x=3").startswith("compare: expected a list")


@pytest.mark.parametrize("override", ["rounds", "=3", ".rounds=3", "clients.=3", "clients..lr=3"])
def test_an_override_that_is_none(override: str) -> None:
    expected = f"override '{override}': expected key=value, for example rounds=3"
    assert refusal(override) == expected


def test_an_override_that_is_no_yaml() -> None:
    assert refusal("rounds=[").startswith("override 'rounds=[': the value is no valid YAML")


def test_a_reference_to_nothing() -> None:
    assert "Interpolation key 'nowhere' not found" in refusal("name=${nowhere}")


@pytest.mark.parametrize(
    ("override", "kind", "some", "nearest"),
    [
        ("aggregator=pfp", "aggregator", ["mean", "pfpt"], "pfpt"),
        ("aggregator.name=pfp", "aggregator", ["mean", "pfpt"], "pfpt"),
        ("aggregator=3", "aggregator", ["mean", "pfpt"], None),
        ("aggregator=", "aggregator", ["mean", "pfpt"], None),
        ("data=digit", "data set", ["digits", "domains"], "digits"),
        ("runtime=rey", "runtime", ["ray", "serial"], "ray"),
        ("runtime.name=rey", "runtime", ["ray", "serial"], "ray"),
        ("partition=dirichelt", "partition", ["dirichlet", "iid"], "dirichlet"),
        ("objective=proxmal", "objective", ["plain", "proximal"], "proximal"),
        ("head=linaer", "head", ["linear", "released"], "linear"),
        ("model=nan0", "model", ["nano", "nano_promptable"], "nano"),
        ("method=pftp", "method", METHODS, "pfpt"),
        ("method=../default", "method", METHODS, None),
        ("compare=[pftp]", "method", METHODS, "pfpt"),
    ],
)
def test_unknown_name(override: str, kind: str, some: list[str], nearest: str | None) -> None:
    message = refusal(override)
    assert f"unknown {kind} '" in message
    listed = message.partition("expected one of ")[2].partition(";")[0].split(", ")
    assert set(some) <= set(listed)
    assert ("did you mean" in message) == (nearest is not None)
    if nearest is not None:
        assert message.endswith(f"did you mean '{nearest}'?")


def test_unknown_experiment() -> None:
    message = refusal(config="quickstrat")
    assert message.startswith("no experiment 'quickstrat': expected the path of a YAML file")
    assert all(name in message for name in list_experiments())
    assert message.endswith("did you mean 'quickstart'?")
    assert "no experiment '../default'" in refusal(config="../default")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"- a\n- b\n", "expected 'key: value' lines, got a list"),
        (b"5\n", "reading it failed"),
        (b"rounds: [1,\nb: }", "reading it failed"),
        (b"rounds: 1\nrounds: 2\n", "duplicate key rounds"),
        (bytes(range(256)), "reading it failed"),
        (b"\x00\x01", "reading it failed"),
        (b"name: ${nowhere}\n", "Interpolation key 'nowhere' not found"),
    ],
    ids=["list", "number", "broken", "duplicate", "binary", "zeros", "interpolation"],
)
def test_a_file_that_is_no_experiment(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = refusal(config=str(path))
    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize("name", ["missing.yaml", "folder", ""])
def test_a_file_that_is_missing(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    message = refusal(config=str(tmp_path / name))
    assert message.startswith(f"no experiment '{tmp_path / name}'")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=-1", "rounds: expected an integer >= 1, got -1"),
        ("rounds=0", "rounds: expected an integer >= 1, got 0"),
        ("eval_every=0", "eval_every: expected an integer >= 1, got 0"),
        ("seed=-1", "seed: expected an integer >= 0, got -1"),
        ("partition.alpha=0", "partition.alpha: expected a finite number > 0, got 0.0"),
        ("partition.alpha=-1", "partition.alpha: expected a finite number > 0, got -1.0"),
        ("partition.alpha=nan", "partition.alpha: expected a finite number > 0, got nan"),
        ("partition.alpha=.inf", "partition.alpha: expected a finite number > 0, got inf"),
        ("clients.count=0", "clients.count: expected an integer >= 1, got 0"),
        ("clients.per_round=0", "clients.per_round: expected an integer >= 1, got 0"),
        ("clients.epochs=0", "clients.epochs: expected an integer >= 1, got 0"),
        ("clients.batch_size=0", "clients.batch_size: expected an integer >= 1, got 0"),
        ("clients.per_round=21", "clients.per_round: cannot sample 21 of 20 clients"),
        ("prompts.count=-1", "prompts.count: expected an integer >= 0, got -1"),
        ("prompts.pool=3", "prompts.count: 5 prompts cannot be selected from a pool of 3"),
        ("prompts.selection=keyd", "prompts.selection: expected one of auto, keyed, l2p, all"),
        ("runtime.threads=0", "runtime.threads: expected an integer >= 1, got 0"),
        ("runtime.actors=0", "runtime.actors: expected an integer >= 1, got 0"),
        ("runtime.actors=40000", "runtime.actors: 40000 actors were requested"),
        ("runtime.device=gpu", "runtime.device: expected one of auto, cpu, cuda"),
        ("head.dropout=1", "head.dropout: expected a finite number >= 0 and < 1, got 1.0"),
        ("objective={name: proximal, mu: -1}", "objective.mu: expected a finite number >= 0"),
        ("compare=[head_only, head_only]", "compare: expected each method once"),
    ],
)
def test_out_of_range(override: str, message: str) -> None:
    assert refusal(override).startswith(message)


@pytest.mark.parametrize("key", ["clients.lr", "prompts.lr", "head.lr", "aggregator.gamma"])
@pytest.mark.parametrize("value", [".nan", "nan", ".inf", "inf", "1e999", "-1"])
def test_numbers_that_are_none(key: str, value: str) -> None:
    got = str(float(value.replace(".n", "n").replace(".i", "i")))
    message = refusal(f"{key}={value}")
    assert message.startswith(f"{key}: expected a finite number >")
    assert message.endswith(f"got {got}")
    assert not math.isfinite(float(got)) or float(got) < 0


def test_more_cpus_or_threads_than_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cpus = available_cpus()
    assert refusal(f"runtime.cpus={cpus + 1}") == (
        f"runtime.cpus: {cpus + 1} CPUs were requested, but this machine has {cpus}; "
        f"set runtime.cpus={cpus} or leave it out"
    )
    message = refusal(f"runtime.threads={cpus + 1}")
    assert message.endswith(f"expected runtime.threads <= {cpus}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data=domains"], "clients"),
        (["data=digits"], False),
        (["data=digits", "prompts.whiten=auto"], False),
        (["data=domains", "prompts.whiten=auto"], "clients"),
        (["data=domains", "prompts.whiten=false"], False),
        (["data=domains", "prompts.whiten=public"], "public"),
        (["data=digits", "prompts.whiten=clients"], "clients"),
    ],
)
def test_queries_are_compared_in_the_clients_metric_where_there_are_several_domains(
    changes: list[str], expected: object
) -> None:
    config = compose("digits", changes)
    assert config.prompts.whiten == expected
    assert config.with_method("fedavg_pt_plus").prompts.whiten == expected
    assert config.tree()["prompts"]["whiten"] == expected
