"""The layers of the package, read from its imports: data flows one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fogzo

ROOT = Path(fogzo.__file__).parent

# Of each module or package right below `fogzo`, which itself re-exports level 2.
LEVELS = {
    "": 2,
    "quantizers": 0,
    "buffers": 0,
    "processes": 0,
    "collectives": 0,
    "rng": 0,
    "schedules": 0,
    "wording": 0,
    "pacing": 1,
    "weights": 1,
    "activations": 1,
    "selection": 1,
    "quantizable": 1,
    "bypasses": 1,
    "layer_audit": 1,
    "attach": 1,
    "noise": 1,
    "directions": 1,
    "probes": 1,
    "stacked_probes": 1,
    "lean_probes": 1,
    "estimators": 2,
    "reference": 2,
    "recipes": 3,
    "bench": 4,
    "cli": 5,
}
# From here on third parties may be imported.
FIRST_WITH_THIRD_PARTIES = 3
HEAVY = {
    "accelerate",
    "brevitas",
    "torchao",
    "kornia",
    "safetensors",
    "tyro",
    "rich",
    "matplotlib",
    "sklearn",
    "transformers",
    "datasets",
    "jinja2",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def level(module):
    top = module.partition(".")[0]
    assert top in LEVELS, f"fogzo.{module} has no layer: give it one in {Path(__file__).name}"
    return LEVELS[top]


def imports(name):
    """What a module imports anywhere in it, as dotted names; relative ones resolved."""
    path = MODULES[name]
    package = ["fogzo", *filter(None, name.split("."))]
    if path.name != "__init__.py":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            # `from fogzo.estimators import stats` may name a module or a class.
            found |= {
                f"{source}.{alias.name}" if inside(f"{source}.{alias.name}") else source
                for alias in node.names
            }
    return found


def inside(dotted):
    """The module of this package that a dotted name is, or None."""
    if dotted == "fogzo":
        return ""
    name = dotted.removeprefix("fogzo.")
    return name if dotted.startswith("fogzo.") and name in MODULES else None


def own_imports(name):
    return {own for dotted in imports(name) if (own := inside(dotted)) is not None}


def test_every_module_has_a_layer_and_every_layer_a_module():
    assert {name.partition(".")[0] for name in MODULES} == set(LEVELS)


def test_every_import_of_the_package_itself_leads_to_a_module():
    for name in MODULES:
        for dotted in imports(name):
            if dotted.partition(".")[0] == "fogzo":
                assert inside(dotted) is not None, f"fogzo.{name} imports {dotted}"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_its_own_layer_and_those_below(name):
    for other in own_imports(name):
        assert level(other) <= level(name), (
            f"fogzo.{name} (layer {level(name)}) imports fogzo.{other} (layer {level(other)})"
        )


@pytest.mark.parametrize("name", [n for n in MODULES if level(n) < FIRST_WITH_THIRD_PARTIES])
def test_the_core_imports_torch_and_the_standard_library_only(name):
    allowed = sys.stdlib_module_names | {"torch", "fogzo"}
    others = {dotted.partition(".")[0] for dotted in imports(name)} - allowed
    assert not others, f"fogzo.{name} imports {', '.join(sorted(others))}"


def test_no_module_below_the_surface_imports_the_whole_package():
    # `import fogzo` inside the core would tie every layer to every other.
    for name in MODULES:
        if name and level(name) < FIRST_WITH_THIRD_PARTIES:
            assert "" not in own_imports(name), f"fogzo.{name} imports fogzo"


def test_there_are_no_cycles():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for other in own_imports(name):
            if other != name:
                visit(other)
        done.add(path.pop())

    for name in MODULES:
        visit(name)


def test_the_package_loads_torch_when_it_is_used_and_nothing_else_of_weight():
    program = (
        "import sys, fogzo; import fogzo.cli.main, fogzo.processes.workers;"
        "assert 'torch' not in sys.modules; fogzo.lsq;"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert {"fogzo", "torch"} <= loaded
    assert not loaded & HEAVY


def test_using_the_package_adds_only_its_own_modules_to_torchs():
    program = (
        "import sys, torch; before = set(sys.modules); import fogzo; fogzo.lsq;"
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    added = {module.partition(".")[0] for module in result.stdout.split()}
    assert added - set(sys.stdlib_module_names) <= {"fogzo", "torch"}
    own = [module for module in result.stdout.split() if module.startswith("fogzo.")]
    assert own
    assert all(level(module.removeprefix("fogzo.")) < FIRST_WITH_THIRD_PARTIES for module in own)


def test_all_that_is_public_exists_and_has_a_docstring():
    assert len(set(fogzo.__all__)) == len(fogzo.__all__)
    assert set(fogzo.__all__) <= set(dir(fogzo))
    for name in fogzo.__all__:
        assert getattr(fogzo, name).__doc__


def test_modules_of_the_core_are_found_as_if_the_package_had_imported_them():
    program = "import fogzo; fogzo.attach.QuantizedLayer, fogzo.noise; print(fogzo.nothing)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "AttributeError: module 'fogzo' has no attribute 'nothing'" in done.stderr
