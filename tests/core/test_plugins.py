"""Plug-ins: found, imported once, sent to other processes, refused in one line."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fedprompt.core import plugins
from fedprompt.core.errors import ConfigError
from fedprompt.core.plugins import Parcel, install, load_plugins
from fedprompt.core.registry import Registry

RULE = """
from __future__ import annotations
import dataclasses
from fedprompt.aggregation import aggregators
from fedprompt.aggregation.mean import Mean

@dataclasses.dataclass(frozen=True)
class Options:
    strength: float = 0.5

@aggregators.register("{name}", Options)
class Rule(Mean):
    pass
"""
YAML = "name: own\nstrength: 0.25\n"


pytestmark = pytest.mark.usefixtures("forgotten_plugins")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_beside_the_experiment_is_loaded_with_its_hash(tmp_path: Path) -> None:
    from fedprompt import aggregation

    file = write(tmp_path / "lab" / "own-rule.py", RULE.format(name="own"))
    [plugin] = load_plugins(["own-rule.py"], tmp_path / "lab")
    assert plugin.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (plugin.spec, plugin.path, plugin.name) == ("own-rule.py", str(file), "own-rule")
    assert aggregation.create("own", strength=2).options.strength == 2


def test_the_same_bytes_are_imported_once_wherever_they_lie(tmp_path: Path) -> None:
    text = "import sys\nsys.outside_count = getattr(sys, 'outside_count', 0) + 1\n"
    first = write(tmp_path / "a" / "once.py", text)
    copy = write(tmp_path / "b" / "once.py", text)
    try:
        one, two = load_plugins([str(first), str(copy)])
        [again] = load_plugins(["../a/once.py"], copy.parent)
        assert again.path == one.path == str(first)
        assert one.module == two.module
        assert sys.outside_count == 1  # type: ignore[attr-defined]
    finally:
        del sys.outside_count  # type: ignore[attr-defined]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "home.py", "VALUE = 1\n")
    [plugin] = load_plugins(["~/home.py"], Path("/nowhere"))
    assert sys.modules[plugin.module].VALUE == 1


def test_modules_and_packages_are_imported_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "outside_pack" / "__init__.py", "")
    part = write(tmp_path / "outside_pack" / "part.py", "VALUE = 1\n")
    write(tmp_path / "outside_pack" / "conf" / "aggregator" / "own.yaml", YAML)
    monkeypatch.syspath_prepend(tmp_path)
    module, package = load_plugins(["outside_pack.part", "outside_pack"])
    assert module.path == str(part)
    assert module.sha256 == hashlib.sha256(part.read_bytes()).hexdigest()
    assert package.path == str(part.parent)
    assert plugins.conf_folders() == [part.parent / "conf"]
    part.write_text("VALUE = 2\n")
    assert plugins._hash(part.parent) != package.sha256


def test_an_edited_file_replaces_what_it_registered(tmp_path: Path) -> None:
    from fedprompt import aggregation

    file = write(tmp_path / "own.py", RULE.format(name="own"))
    load_plugins([str(file)])
    file.write_text(file.read_text().replace("0.5", "0.75"))
    [plugin] = load_plugins([str(file)])
    assert aggregation.create("own").options.strength == 0.75
    assert plugins.loaded() == (plugin,)


def test_a_failed_import_can_be_mended(tmp_path: Path) -> None:
    from fedprompt import aggregation

    file = write(tmp_path / "own.py", RULE.format(name="own") + "\nnope\n")
    with pytest.raises(ConfigError, match="NameError"):
        load_plugins([str(file)])
    file.write_text(RULE.format(name="own"))
    load_plugins([str(file)])
    assert aggregation.create("own").options.strength == 0.5


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        (
            "absent.py",
            None,
            r"'absent.py': expected a Python file, got 'No such file.*for .*folder$",
        ),
        ("outside_absent", None, "expected a module that can be imported, found none; install"),
        ("outside_beside", "", r"found none; .*; did you mean 'outside_beside.py'\?"),
        ("sys", None, r"'sys': expected a module that has a file$"),
        ("some/folder", None, r"'some/folder': expected the dotted name of a module or the path"),
        ("bad.py", "x = 1\n\nx.y\n", r"AttributeError: 'int' object has.*bad\.py:3\)$"),
        ("bad.py", "import json\njson.loads('')", r"JSONDecodeError: .*bad\.py:2\)$"),
        ("bad.py", "import outside_absent", r"ModuleNotFoundError: No module .*bad\.py:1\)$"),
        ("bad.py", "raise SystemExit(3)", r"import failed with SystemExit: 3 \(.*bad\.py:1\)$"),
        ("bad.py", "x = (\n", r"SyntaxError: '\(' was never closed \(.*bad\.py:1\)$"),
        (
            "bad.py",
            RULE.format(name="gmm"),
            r"plug-in 'bad.py': aggregator 'gmm' is registered twice: in "
            r"fedprompt.aggregation.gmm and in .*bad\.py; choose another name$",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, spec: str, text: str | None, message: str
) -> None:
    if text is not None:
        write(tmp_path / f"{spec.removesuffix('.py')}.py", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_plugins([spec], tmp_path)
    assert "\n" not in str(caught.value)
    assert plugins.loaded() == ()


def test_on_the_command_line_paths_start_from_the_current_folder() -> None:
    with pytest.raises(ConfigError, match=r"relative paths start from the current folder$"):
        load_plugins(["absent.py"])


def test_text_is_no_list() -> None:
    with pytest.raises(ConfigError, match=r"plugins: expected a list such as \[a.py\]"):
        load_plugins("a.py")


def test_two_plug_ins_of_one_name_are_both_named(tmp_path: Path) -> None:
    first = write(tmp_path / "one.py", RULE.format(name="own"))
    second = write(tmp_path / "two.py", RULE.format(name="own"))
    with pytest.raises(ConfigError) as caught:
        load_plugins([str(first), str(second)])
    assert f"'own' is registered twice: in {first} and in {second}" in str(caught.value)


@pytest.fixture
def parcel(tmp_path: Path) -> bytes:
    """A plug-in's object and what it needs, of which no file is left."""
    file = write(tmp_path / "own.py", RULE.format(name="own"))
    yaml = write(tmp_path / "conf" / "aggregator" / "own.yaml", YAML)
    [plugin] = load_plugins([str(file)])
    assert plugins.conf_folders() == [tmp_path / "conf"]
    value = sys.modules[plugin.module].Options(strength=3.0)
    content = pickle.dumps(Parcel.pack(value))
    for path in (file, yaml):
        path.unlink()
    yaml.parent.rmdir()
    yaml.parent.parent.rmdir()
    return content


def test_a_parcel_opens_in_a_process_that_has_no_such_file(parcel: bytes, tmp_path: Path) -> None:
    code = f"""
import pickle, sys
options = pickle.loads(sys.stdin.buffer.read()).open()
from fedprompt import aggregation
from fedprompt.core.plugins import conf_folders, load_plugins
print(options.strength, aggregation.create("own").options.strength)
print((conf_folders()[0] / "aggregator" / "own.yaml").read_text() == {YAML!r})
print(load_plugins([{str(tmp_path / "own.py")!r}])[0].spec)
"""
    result = subprocess.run([sys.executable, "-c", code], input=parcel, capture_output=True)
    assert result.stderr == b""
    assert result.stdout.decode().splitlines() == ["3.0 0.5", "True", str(tmp_path / "own.py")]


def test_an_installed_module_must_be_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "outside_same.py", "")
    monkeypatch.syspath_prepend(tmp_path)
    sent = load_plugins(["outside_same"])
    plugins._plugins.clear()
    install(sent)
    assert plugins.loaded() == plugins.find(["outside_same"]) == sent
    file.write_text("# another version\n")
    with pytest.raises(ConfigError, match=f"expected sha256 {sent[0].sha256[:12]}, .*same version"):
        install(sent)


class Point:
    """An entry point as `importlib.metadata` gives it."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module


def test_entry_points_are_imported_when_a_name_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedprompt.aggregation import aggregators

    write(tmp_path / "outside_good.py", RULE.format(name="own"))
    write(tmp_path / "outside_broken.py", "1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    asked: list[str] = []

    def entry_points(group: str) -> list[Point]:
        asked.append(group)
        return [Point("broken", "outside_broken"), Point("good", "outside_good")]

    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", entry_points)
    aggregators.entry("mean")
    assert asked == []
    assert aggregators.entry("own").name == "own"
    assert "own" in aggregators.names()
    assert asked == ["fedprompt.plugins"]
    with pytest.raises(ConfigError, match=r"'zz': .*'outside_broken': .*ZeroDivisionError"):
        aggregators.entry("zz")
    assert [plugin.name for plugin in plugins.load_installed()] == ["outside_good"]
    assert plugins.imported_installed() == plugins.load_installed()
    assert plugins.loaded() == ()


def test_a_plug_in_cannot_take_a_name_that_the_package_has_not_loaded_yet(tmp_path: Path) -> None:
    package = write(tmp_path / "fedprompt_like" / "__init__.py", "").parent
    write(
        package / "rules.py",
        "import dataclasses\nfrom fedprompt_like import registry\n"
        "@dataclasses.dataclass(frozen=True)\nclass Options: pass\n"
        "@registry.register('known', Options)\ndef known(options): return 1\n",
    )
    write(
        package / "__init__.py",
        "from fedprompt.core.registry import Registry\nregistry = Registry('rule', __name__)\n",
    )
    file = write(
        tmp_path / "late.py",
        "from fedprompt_like import registry\n"
        "@registry.register('known', object)\ndef mine(options): return 2\n",
    )
    code = f"from fedprompt.core.plugins import load_plugins; load_plugins([{str(file)!r}])"
    environment = {"PYTHONPATH": ":".join([*sys.path, str(tmp_path)])}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert f"is registered twice: in {package / 'rules.py'} and in {file}" in result.stderr


def test_a_script_may_name_itself(tmp_path: Path) -> None:
    script = RULE.format(name="own") + (
        "\nif __name__ == '__main__':\n"
        "    from fedprompt.core.plugins import load_plugins\n"
        "    [plugin] = load_plugins([__file__])\n"
        "    print(aggregators.entry('own').factory.__module__ == plugin.module)\n"
    )
    file = write(tmp_path / "script.py", script)
    result = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_registered_twice_in_one_file_is_refused() -> None:
    registry: Registry[int] = Registry("thing", "fedprompt.core")

    def one(options: object) -> int:
        return 1

    registry.register("x", object)(one)
    with pytest.raises(
        ConfigError, match=r"thing 'x' is registered twice: in .* and in .*; choose"
    ):
        registry.register("x", object)(one)


def test_two_files_of_one_name_would_overwrite_each_other_in_a_run(tmp_path: Path) -> None:
    write(tmp_path / "a" / "rule.py", "A = 1\n")
    write(tmp_path / "b" / "rule.py", "B = 1\n")
    with pytest.raises(ConfigError, match=r"'a/rule.py' and 'b/rule.py': .*got rule twice; rename"):
        load_plugins(["a/rule.py", "b/rule.py"], tmp_path)


def test_a_class_of_a_script_is_refused_where_the_script_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = types.ModuleType("outside_script")
    monkeypatch.setitem(sys.modules, script.__name__, script)
    exec("class Options: pass", vars(script))
    parcel = Parcel.pack(script.Options())
    monkeypatch.delitem(sys.modules, script.__name__)
    with pytest.raises(
        ConfigError, match=r"outside_script.*name the file that defines it: plugins"
    ):
        parcel.open()
