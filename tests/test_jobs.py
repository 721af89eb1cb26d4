"""The scripts and templates of `jobs/`, as far as they can be tested without a cluster."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from fedprompt.runtime.ray import private

JOBS = Path(__file__).parents[1] / "jobs"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Any]:
    """The modules `cluster` and `submit`, with a state folder of their own."""
    monkeypatch.syspath_prepend(str(JOBS))
    monkeypatch.setenv("FEDPROMPT_CLUSTER", str(tmp_path / "cluster"))
    monkeypatch.delenv("RAY_JOBS_ADDRESS", raising=False)
    names = ("cluster", "submit")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    cluster, submit = map(importlib.import_module, names)
    return cluster, submit


def test_the_end_of_a_log_says_nothing_of_its_connection(
    scripts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's client says at level INFO that a WebSocket was closed, when a job has ended."""
    _, submit = scripts
    client = SimpleNamespace(list_jobs=list)
    jobs = SimpleNamespace(JobSubmissionClient=lambda address: client)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(job_submission=jobs))
    monkeypatch.setitem(sys.modules, "ray.job_submission", jobs)
    speaker = logging.getLogger("ray.dashboard.modules.job.sdk")
    monkeypatch.setattr(speaker, "level", logging.INFO)
    assert submit.connect("http://127.0.0.1:1") is client
    assert not speaker.isEnabledFor(logging.INFO)
    assert speaker.isEnabledFor(logging.WARNING)


def test_the_command_line_survives_the_shell(scripts: tuple[Any, Any]) -> None:
    """What a user gives arrives as it is, whatever the shell would make of it."""
    _, submit = scripts
    arguments = ["compare=[a, b]", 'note=it\'s $(touch /tmp/x); `id` "x"', "run_dir=a b\nc"]
    line = submit.entrypoint("python", "run", "my run.yaml", arguments)
    printed = "import json, sys; print(json.dumps(sys.argv[1:]))"
    shown = line.replace("python -u -m fedprompt", shlex.join([sys.executable, "-c", printed]), 1)
    result = subprocess.run(shown, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == ["run", "my run.yaml", *arguments]


def test_the_cluster_keeps_the_spare_workers_of_the_package(scripts: tuple[Any, Any]) -> None:
    """The script imports no torch, so that it has the settings twice."""
    cluster, _ = scripts
    assert private.ENVIRONMENT == cluster.SPARE_WORKERS
    assert private.ENVIRONMENT.items() <= cluster.environment(Path("token")).items()
    importlib.import_module(private.PRELOADED)


def test_options_may_stand_before_and_after_the_name(scripts: tuple[Any, Any]) -> None:
    _, submit = scripts
    for line in (
        "run --storage s quickstart -- rounds=2",
        "run quickstart --storage s -- rounds=2",
    ):
        options = submit.parse([*line.split(), "--resume"])
        assert (options.name, options.storage) == ("quickstart", "s")
        assert options.arguments == ["rounds=2", "--resume"]
    assert submit.parse(["run", "quickstart", "rounds=2"]).arguments == ["rounds=2"]


def test_results_go_to_the_storage_unless_named(scripts: tuple[Any, Any]) -> None:
    _, submit = scripts
    storage = Path("/storage")
    (run_dir,) = submit.with_storage("run", "a/mine.yaml", [], storage)
    assert run_dir.startswith("run_dir=/storage/mine-")
    assert submit.with_storage("run", "x", ["run_dir=here"], storage) == ["run_dir=here"]
    option, folder = submit.with_storage("sweep", "alpha", [], storage)
    assert option == "--dir"
    assert folder.startswith("/storage/sweep-alpha-")
    assert submit.with_storage("sweep", "x", ["--resume", "y"], storage) == ["--resume", "y"]


def test_what_is_shipped_runs_without_the_checkout(
    scripts: tuple[Any, Any], tmp_path: Path
) -> None:
    _, submit = scripts
    mine = tmp_path / "mine.yaml"
    mine.write_text("rounds: 7\n")
    folder = tmp_path / "shipped"
    folder.mkdir()
    submit.stage(folder, str(mine))
    code = (
        "import fedprompt, fedprompt.config as c; print(fedprompt.__file__, c.conf_root()); "
        "import fedprompt.__main__ as m; m.main(['run', 'mine.yaml', '--print-config'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    where, _, printed = result.stdout.partition("\n")
    assert yaml.safe_load(printed)["rounds"] == 7
    assert all(path.startswith(str(folder)) for path in where.split())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 50e6


def test_plug_in_files_are_shipped_with_the_yaml_beside_them(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, submit = scripts
    lab, folder = tmp_path / "lab", tmp_path / "shipped"
    for name in ("a.py", "sub/b.py", "sub/conf/aggregator/b.yaml", "other/c.py"):
        path = lab / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    experiment, sweep = lab / "experiment.yaml", tmp_path / "sweep.yaml"
    experiment.write_text("plugins: [a.py, sub/b.py, my_package.rules]\n")
    sweep.write_text(f"experiment: {experiment}\n")
    shipped = 'plugins=["plugins/a.py", "plugins/b.py", "my_package.rules"]'
    for number, file in enumerate((experiment, sweep)):
        given = submit.stage_plugins(folder / str(number), str(file), ["rounds=2"])
        assert given == ["rounds=2", shipped]
    assert (folder / "0/plugins/conf/aggregator/b.yaml").read_text() == "sub/conf/aggregator/b.yaml"

    # The command line's count instead, and start from the current folder.
    monkeypatch.chdir(lab / "other")
    line = ["plugins=[c.py]", "rounds=2"]
    given = submit.stage_plugins(folder / "line", str(experiment), line)
    assert given == ["rounds=2", 'plugins=["plugins/c.py"]']
    assert [path.name for path in (folder / "line").rglob("*.py")] == ["c.py"]
    for same in ("quickstart", str(lab / "a.py")):  # nothing is named, or it is no YAML mapping
        assert submit.stage_plugins(folder, same, ["rounds=2"]) == ["rounds=2"]
    assert submit.stage_plugins(folder, str(experiment), ["--resume", "x"]) == ["--resume", "x"]
    for wrong, message in (
        ("[d.py]", "plug-in 'd.py': no file .*other/d.py"),
        ("[c.py, ../other/c.py]", "plug-in '../other/c.py': two have the same name"),
    ):
        with pytest.raises(submit.JobError, match=message):
            submit.stage_plugins(folder / wrong, "quickstart", [f"plugins={wrong}"])


@pytest.mark.parametrize(
    ("status", "code", "expected", "message"),
    [
        ("SUCCEEDED", 0, 0, None),
        ("FAILED", 2, 2, "job j FAILED with exit code 2"),
        ("FAILED", None, 1, "job j FAILED: no such image"),
        ("STOPPED", None, 143, "job j was stopped"),
    ],
)
def test_the_exit_code_is_the_jobs_own(
    scripts: tuple[Any, Any],
    capsys: pytest.CaptureFixture[str],
    status: str,
    code: int | None,
    expected: int,
    message: str | None,
) -> None:
    _, submit = scripts
    info = SimpleNamespace(status=status, driver_exit_code=code, message="trace\nno such image")
    client = SimpleNamespace(get_job_info=lambda job: info)
    assert submit.result(client, "j") == expected
    assert capsys.readouterr().err == ("" if message is None else f"error: {message}\n")


def test_without_a_cluster_it_says_so(scripts: tuple[Any, Any]) -> None:
    _, submit = scripts
    with pytest.raises(submit.JobError, match="no cluster: expected --address"):
        submit.connect(None)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_stopping_ends_what_was_started_and_nothing_else(
    scripts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a child of it; but not a process that has got a recorded id since."""
    cluster, _ = scripts
    monkeypatch.setattr(cluster, "PATIENCE", 2.0)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    parent = subprocess.Popen(
        ["sh", "-c", f"{shlex.join(sleep)} & {shlex.join(sleep)}"], start_new_session=True
    )
    other = subprocess.Popen(sleep, start_new_session=True)
    try:
        folder = cluster.state_folder()
        folder.mkdir()
        (folder / "token").write_text("secret")
        temporary = tmp_path / "ray"
        temporary.mkdir()
        recorded = {"name": "head", "pid": parent.pid, "started": cluster.start_time(parent.pid)}
        reused = {"name": "old", "pid": other.pid, "started": 1}
        cluster.write_state(
            {"dashboard": "x", "temporary": str(temporary), "processes": [recorded, reused]}
        )
        assert cluster.stop() == 0
        parent.wait(timeout=10)
        assert cluster.members(parent.pid) == []
        assert other.poll() is None
        assert not temporary.exists()
        assert not folder.exists()
        assert cluster.stop() == 0  # there is nothing to stop
    finally:
        other.kill()
        other.wait()
        if parent.poll() is None:
            parent.kill()
        parent.wait()


def test_the_token_is_for_the_owner_and_the_processes_get_it(scripts: tuple[Any, Any]) -> None:
    cluster, _ = scripts
    env = cluster.environment(Path("/x/token"))
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"]) == ("token", "/x/token")
    assert "RAY_ADDRESS" not in env


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_slurm_script_is_valid() -> None:
    path = JOBS / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert all(line.split()[1].startswith("--") for line in lines)
    text = path.read_text()
    heredoc = text.split("<<'PYTHON'\n")[1].split("\nPYTHON\n")[0]
    compile(heredoc, "heredoc", "exec")
    # Without arguments it says how to call it, before it touches anything.
    result = subprocess.run(["bash", str(path)], capture_output=True, text=True, env=os.environ)
    assert (result.returncode, result.stderr.split(":")[0]) == (2, "usage")


def test_the_kubernetes_template_is_valid() -> None:
    job = yaml.safe_load((JOBS / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    command, *_ = shlex.split(job["spec"]["entrypoint"])
    assert command == "fedprompt"
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        names = {each["name"] for each in container["env"]}
        assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "FEDPROMPT_CACHE"} <= names
        mounts = {each["name"] for each in container["volumeMounts"]}
        assert mounts == {each["name"] for each in group["template"]["spec"]["volumes"]}
        assert all(isinstance(each, str) for each in group["rayStartParams"].values())


def test_the_launcher_template_is_valid() -> None:
    config = yaml.safe_load((JOBS / "cluster.yaml").read_text())
    assert config["provider"]["type"] == "local"
    assert len(config["provider"]["worker_ips"]) == config["min_workers"] == config["max_workers"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all("RAY_AUTH_MODE=token" in line for line in config[key] if "ray start" in line)
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(config))
