"""A finished run is used again exactly while the code that made it is the same."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fogzo_lab
from fogzo_lab.comparison import run_cache
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.environment import library_versions
from fogzo_lab.training.checkpoint import save_checkpoint
from fogzo_lab.training.method_config import MethodConfig

SOURCE = Path(fogzo_lab.__file__).parents[1]
# They choose devices' names, read options and write files; what they hand on is in the config.
CHANGE_NO_NUMBER = ("fogzo_lab", "fogzo_lab.options", "fogzo_lab.system")


def hashed(monkeypatch):
    """The modules that go into the version of the code."""
    paths = []
    monkeypatch.setattr(run_cache, "_statements", lambda path: str(paths.append(path)))
    run_cache.code_version.__wrapped__()
    parts = [path.relative_to(SOURCE).with_suffix("").parts for path in paths]
    return {".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts}


def test_comments_docstrings_and_layout_are_no_other_version(tmp_path):
    code = 'def f(x):\n    """Twice."""\n    # two\n    return 2 * x\n'
    same = 'def f(x):\n    """Two times."""\n    return (\n        2 * x\n    )\n'
    other = code.replace("2 *", "3 *")
    found = []
    for number, text in enumerate((code, same, other)):
        path = tmp_path / f"{number}.py"
        path.write_text(text)
        found.append(run_cache._statements(path))
    assert found[0] == found[1] != found[2]


def test_other_libraries_are_another_version_and_unused_syntax_of_later_pythons_is_not(monkeypatch):
    compute, tree = run_cache.code_version.__wrapped__, ast.parse("def f(x): return x")
    before = compute()
    assert "transformers" in library_versions() and compute() == before
    monkeypatch.setattr(run_cache, "library_versions", lambda: {"transformers": "5.99.0"})
    assert compute() != before
    said = run_cache._written(tree)
    tree.body[0].type_params = []
    tree.body[0]._fields = (*tree.body[0]._fields, "type_params")
    assert run_cache._written(tree) == said


def test_torchao_makes_other_runs_of_parq_alone(monkeypatch):
    recipe = replace(RECIPES["digits-mlp"](), estimator="ste")
    configs = [replace(recipe, method=MethodConfig(name=name)) for name in ("none", "parq")]
    before = [run_cache.config_hash(config) for config in configs]
    monkeypatch.setattr(run_cache, "version_of", lambda library: "99.0")
    after = [run_cache.config_hash(config) for config in configs]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_every_module_that_a_run_executes_is_part_of_the_version(monkeypatch):
    program = (
        "import sys, fogzo, fogzo_lab.comparison.runs; fogzo.lsq;"
        "print(*[m for m in sys.modules if m.partition('.')[0] in ('fogzo', 'fogzo_lab')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    names = hashed(monkeypatch)
    missing = {
        module
        for module in done.stdout.split()
        if module not in names
        and not (module in CHANGE_NO_NUMBER or module.startswith("fogzo_lab.system."))
        and not module.startswith("fogzo_lab.comparison")  # chooses runs and reads them
    }
    assert missing == set()


def test_reports_commands_and_benchmarks_are_not(monkeypatch):
    names = hashed(monkeypatch)
    assert {"fogzo.estimators.base", "fogzo_lab.training.loop", "fogzo_lab.data.images"} <= names
    rooms = {".".join(name.split(".")[:2]) for name in names}
    assert not rooms & {"fogzo_lab.bench", "fogzo_lab.cli"}
    assert "fogzo_lab.comparison.report" not in names


def test_a_run_is_the_same_however_many_processes_load_its_data():
    recipe = RECIPES["digits-mlp"]()
    more = replace(recipe, data=replace(recipe.data, workers=8))
    assert run_cache.config_hash(more) == run_cache.config_hash(recipe)


def test_a_run_is_another_one_when_its_initial_weights_are(tmp_path):
    folder = tmp_path / "run"
    checkpoints = {
        step: save_checkpoint(folder, step, {"weight": step}, keep=9) for step in (2, 999999, 10**6)
    }

    def key(weights):
        run_cache.RunCache(tmp_path, "code")  # a comparison reads them once
        return run_cache.config_hash(replace(RECIPES["digits-mlp"](), initial_weights=weights))

    keys = {step: key(path) for step, path in checkpoints.items()}
    assert len({*keys.values(), key(None)}) == 4
    assert key(folder) == keys[10**6]
    checkpoints[10**6].rename(checkpoints[10**6].with_suffix(".diverged"))
    assert key(folder) == keys[999999]
    for nowhere in (tmp_path / "nowhere", folder / "checkpoints" / "step-000003"):
        with pytest.raises(ValueError, match="no whole checkpoint"):
            key(nowhere)
