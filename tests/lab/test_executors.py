"""Comparisons whose runs other machines compute: the same numbers, whoever dies meanwhile."""

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch
from in_this_process import compare_in_this_process

from fogzo_lab.comparison.compare import CompareConfig, compare, plan
from fogzo_lab.comparison.execution import ExecutionConfig, machines, run_elsewhere
from fogzo_lab.comparison.run_cache import code_version
from fogzo_lab.comparison.runs import Run
from fogzo_lab.executors import ray_cluster
from fogzo_lab.executors.calls import Call, Died, Executor
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system import signals


def config_in(folder, rows=("ptq", "fogzo"), **execution):
    # A float network is quantized after training, so that its checkpoint has to travel.
    base = replace(RECIPES["digits-mlp"](), max_steps=60, output_dir=folder)
    return CompareConfig(
        base=base,
        rows=rows,
        learning_rates=(3e-3,),
        num_seeds=2,
        equal_time=False,
        workers=2,
        execution=ExecutionConfig(**execution),
    )


def numbers(folder):
    """What does not depend on the speed or the name of a machine."""
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        del row["seconds"]
        for part in (*row["seeds"], *row["curve"]):
            del part["seconds"]
    return {name: results[name] for name in ("code", "grid", "rows", "differences")}


class _Dying(Executor):
    """Computes two calls at a time; the process of every one dies in its first try."""

    def __init__(self):
        super().__init__(at_once=2)
        self.tries = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def _start(self, call):
        self.tries.append(call.name)
        return call.name

    def _wait(self, computing):
        return list(computing)[:1]

    def _answer(self, name):
        if self.tries.count(name) == 1:
            raise Died("exit code 1")
        return name


def test_every_call_may_die_once_whichever_memory_it_lies_in():
    names = [f"run {number}" for number in range(20)]
    with _Dying() as executor:  # each call is freed before the next one is made
        assert set(executor.results(Call(name, print, ()) for name in names)) == set(names)
    with _Dying() as executor, pytest.raises(ChildProcessError, match="run 1: its process died tw"):
        executor._answer = lambda name: (_ for _ in ()).throw(Died("exit code 1"))
        list(executor.results([Call("run 1", print, ())]))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A comparison whose runs share files, and its numbers."""
    folder = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        compare_in_this_process(patch)
        found = compare(config_in(folder))
    assert "machines" not in found.environment
    return folder


def in_known_time(folder, local):
    """A folder of a comparison that need not measure step times."""
    shutil.copy(local / "timing.json", folder)
    return folder


def test_files_travel_where_they_are_not_shared(local, tmp_path, monkeypatch):
    compare_in_this_process(monkeypatch, shares_files=False)
    found = compare(config_in(tmp_path))
    assert numbers(tmp_path) == numbers(local)
    assert "machines" not in found.environment  # all are this one
    # A run that has come from elsewhere, perhaps with the whole folder.
    path = next((tmp_path / "runs").glob("fogzo-*/machine.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor": "Z80"}))
    found = compare(config_in(tmp_path))  # nothing is left to run
    assert numbers(tmp_path) == numbers(local)
    # Of FOGZO, and what is quantized; the float runs behind it are no row.
    here, there = sorted(found.environment["machines"].split("; "))[::-1]
    assert here.startswith("3 runs: ")
    assert there.startswith("1 runs: Z80, ")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"machine\.json has no 'processor': delete the file"):
        machines([path.parent])


@contextlib.contextmanager
def one_death(is_at_work):
    """Kill one of the processes that are at work on a run, as soon as there is one."""
    killed, over = [], threading.Event()

    def watch():
        while not killed and not over.is_set():
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if is_at_work(process):
                        process.kill()
                        killed.append(process)
                        return
            time.sleep(0.1)  # looking costs processor time that the runs need

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_ray_computes_the_same_and_a_worker_may_die(local, tmp_path, caplog, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fogzo[ray]'")
    # Workers that it starts ahead know no packages of the task, and end unused.
    for name in ("RAY_prestart_worker_first_driver", "RAY_enable_worker_prestart"):
        monkeypatch.setenv(name, "0")
    # By default workers give way to every other process, here to the other tests for minutes.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    with one_death(lambda process: "ray::fogzo-lr" in " ".join(process.cmdline())) as killed:
        found = compare(config_in(in_known_time(tmp_path, local), executor="ray"))
    assert killed
    assert "its process died" in caplog.text
    assert numbers(tmp_path) == numbers(local)
    assert "machines" not in found.environment


def test_submitit_computes_the_same_and_a_job_may_die(local, tmp_path, caplog, monkeypatch):
    submitit = pytest.importorskip(
        "submitit", reason="submitit is not installed: pip install 'fogzo[slurm]'"
    )
    # It waits for the answer of a dead job, which a slow file system may bring late.
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 1)
    with one_death(
        lambda process: (
            "submitit.core._submit" in process.cmdline() and process.cpu_times().user > 1
        )
    ) as killed:
        compare(
            config_in(
                in_known_time(tmp_path, local),
                rows=("fogzo",),
                executor="slurm",
                slurm_cluster="local",
            )
        )
    assert killed
    assert "its process died" in caplog.text
    assert numbers(tmp_path)["rows"] == numbers(local)["rows"][1:]


def test_other_code_or_other_data_are_refused(tmp_path, monkeypatch):
    run = Run("fogzo", replace(RECIPES["digits-mlp"](), max_steps=1))
    with pytest.raises(ValueError, match="another version of fogzo or of its lib"):
        run_elsewhere(run, tmp_path / "a-b-c", {}, 1, "0123456789ab")
    with pytest.raises(ValueError, match="other data than the driver at ImagesConfig"):
        run_elsewhere(run, tmp_path / "fogzo-0123-4567", {}, 1, code_version())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gpus_per_run": 1}, "--executor ray"),
        ({"executor": "slurm", "gpus_per_run": 0.5}, "--gpus-per-run 1, or --executor ray"),
        ({"executor": "dask"}, "one of local, ray, slurm"),
    ],
)
def test_what_an_executor_cannot_do_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        ExecutionConfig(**options)


class _AtWorkError(Exception):
    """The executor of a comparison was asked for."""


@pytest.mark.parametrize(
    ("execution", "expected", "says"),
    [
        ({"executor": "ray", "ray_address": "auto"}, _AtWorkError, None),
        ({"executor": "slurm"}, _AtWorkError, None),
        ({}, ValueError, "cannot compute on 'cuda"),
        ({"executor": "ray"}, ValueError, "cannot compute on 'cuda"),
        ({"executor": "slurm", "slurm_cluster": "local"}, ValueError, "cannot compute on 'cuda"),
    ],
)
def test_only_a_machine_that_computes_needs_the_device(
    tmp_path, monkeypatch, execution, expected, says
):
    def start_executor(*_):
        raise _AtWorkError

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("fogzo_lab.comparison.compare.start_executor", start_executor)
    config = config_in(tmp_path, **execution)
    config = replace(config, base=replace(config.base, device="cuda"))
    for call in (compare, plan):
        with pytest.raises(expected, match=says):
            call(config)


class _Ray:
    """As much of Ray as a block without calls needs; keeps the options of its tasks."""

    exceptions = None

    def init(self, **options):
        self.processors = options.get("num_cpus")

    def nodes(self):
        dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [dead, {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}]

    def shutdown(self):
        pass

    def remote(self, **options):
        self.options = options
        return lambda function: function


@pytest.mark.parametrize(("gpus", "calls_of_a_worker"), [(0, 0), (1, 1), (0.5, 1)])
def test_a_worker_of_ray_ends_with_the_gpu_it_was_given(monkeypatch, gpus, calls_of_a_worker):
    ray = _Ray()
    monkeypatch.setattr(ray_cluster, "_import_ray", lambda: ray)
    with ray_cluster.RayTasks(2, cpus=3, gpus=gpus):
        pass
    assert ray.processors == 6
    assert ray.options["num_gpus"] == gpus
    assert ray.options["max_calls"] == calls_of_a_worker


@pytest.mark.parametrize(
    ("promised", "are_too_many"),
    [({"cpus": 4, "gpus": 1}, False), ({"cpus": 5}, True), ({"gpus": 2}, True)],
)
def test_promises_that_no_machine_of_a_cluster_can_keep_are_told(
    monkeypatch, caplog, promised, are_too_many
):
    monkeypatch.setattr(ray_cluster, "_import_ray", _Ray)
    with ray_cluster.RayTasks(2, "auto", **promised):
        pass
    assert ("all wait until one joins" in caplog.text) == are_too_many


def test_a_signal_ends_a_wait_for_ray_with_its_own_exit_code(monkeypatch):
    def wait(handles, num_returns, timeout=None):
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            sys.exit(1)  # as Ray does
        return [], handles

    monkeypatch.setattr(_Ray, "wait", staticmethod(wait), raising=False)
    monkeypatch.setattr(ray_cluster, "_import_ray", _Ray)
    with pytest.raises(signals.Terminated) as ended, signals.raised():
        ray_cluster.RayTasks(1)._wait(["a handle"])
    assert ended.value.code == 143


def test_what_ray_refuses_is_said_in_our_words(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fogzo[ray]'")
    with (
        pytest.raises(ValueError, match=r"'nonsense'.*--ray-address 10\.0\.0\.1:6379"),
        ray_cluster.RayTasks(1, "nonsense"),
    ):
        pass

    def get(handle):
        raise ray.exceptions.RuntimeEnvSetupError("pip\nfailed")

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ValueError, match=r"could not begin a run: .*pip failed.*--cpus-per-run 1"):
        ray_cluster.RayTasks(1)._answer(None)


def test_without_slurm_the_message_says_how_to_try(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=r"no srun.*--slurm-cluster local"):
        compare(config_in(tmp_path, executor="slurm"))
