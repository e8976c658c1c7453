"""The floors of the two packages, read from their imports: data flows one way."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fogzo
import fogzo_lab

ROOTS = {package.__name__: Path(package.__file__).parent for package in (fogzo, fogzo_lab)}

# Floors of the library and of the laboratory above it; both packages themselves come last.
LEVELS = {
    "fogzo.collectives": 0,
    "fogzo.wording": 0,
    "fogzo.quantizers": 0,
    "fogzo.layers": 1,
    "fogzo.methods": 2,
    "fogzo.export": 2,
    "fogzo.probing": 2,
    "fogzo.estimators": 3,
    "fogzo.inspection": 4,
    "fogzo.integrations": 4,
    "fogzo": 4,
    "fogzo_lab": 5,
    "fogzo_lab.figures": 5,
    "fogzo_lab.dynamics": 5,
    "fogzo_lab.interleaved": 5,
    "fogzo_lab.options": 5,
    "fogzo_lab.executors": 5,
    "fogzo_lab.system": 5,
    "fogzo_lab.table": 5,
    "fogzo_lab.data": 6,
    "fogzo_lab.training": 7,
    "fogzo_lab.recipes": 8,
    "fogzo_lab.comparison": 9,
    "fogzo_lab.bench": 9,
    "fogzo_lab.cli": 10,
}
# What export writes with and reads back with, imported where it is needed.
EXPORTERS = {"safetensors", "transformers", "compressed_tensors", "gguf", "numpy"}
EXPORTERS |= {"accelerate", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "torchao"}
# The libraries in whose loops the estimators work, likewise.
HOSTS = {"accelerate", "brevitas", "lightning", "peft", "torchao", "transformers"}
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
    "ray",
    "submitit",
}


def module_name(package, path):
    parts = (package, *path.relative_to(ROOTS[package]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(package, path): path
    for package, root in ROOTS.items()
    for path in sorted(root.rglob("*.py"))
}
LIBRARY = [name for name in MODULES if name.partition(".")[0] == "fogzo"]


def room(module):
    """A package's module or folder right below it; a package itself is a room of its own."""
    return ".".join(module.split(".")[:2])


def level(module):
    assert room(module) in LEVELS, f"{module} has no floor: give it one in {Path(__file__).name}"
    return LEVELS[room(module)]


def imports(name):
    """What a module imports anywhere in it, as dotted names; relative ones resolved."""
    path = MODULES[name]
    package = name.split(".")
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
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return found


def own_imports(name):
    return imports(name) & set(MODULES)


def test_every_room_has_a_floor_and_every_floor_a_room():
    assert {room(name) for name in MODULES} == set(LEVELS)


def test_every_import_of_the_packages_themselves_leads_to_a_module():
    for name in MODULES:
        for dotted in imports(name):
            if dotted.partition(".")[0] in ROOTS:
                assert dotted in MODULES, f"{name} imports {dotted}"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_its_own_floor_and_those_below(name):
    for other in own_imports(name):
        assert level(other) <= level(name), (
            f"{name} (floor {level(name)}) imports {other} (floor {level(other)})"
        )


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_imports_torch_and_the_standard_library_only(name):
    allowed = sys.stdlib_module_names | {"torch", "fogzo"}
    allowed |= {"fogzo.export": EXPORTERS, "fogzo.integrations": HOSTS}.get(room(name), set())
    others = {dotted.partition(".")[0] for dotted in imports(name)} - allowed
    assert not others, f"{name} imports {', '.join(sorted(others))}"


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


STAGES = {
    "imported": "import fogzo, fogzo_lab.cli.main, fogzo_lab.executors.local",
    "torch": "import torch",
    "used": "fogzo.layers.attach, fogzo.probing.directions, fogzo.lsq",
    "export": "import fogzo.export",
}
"""What a program does one after another."""


@pytest.fixture(scope="module")
def loaded():
    """The modules that each stage has loaded besides those of the stages before."""
    program = "import sys, json\nloaded, before = {}, set(sys.modules)\n"
    for name, statement in STAGES.items():
        program += f"{statement}\nloaded[{name!r}] = list(set(sys.modules) - before)\n"
        program += "before = set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{program}print(json.dumps(loaded))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def packages(modules):
    return {module.partition(".")[0] for module in modules}


def test_the_package_loads_torch_when_it_is_used_and_nothing_else_of_weight(loaded):
    assert "fogzo" in packages(loaded["imported"])
    assert not packages(loaded["imported"]) & {"torch", *HEAVY}
    assert not packages(loaded["torch"] + loaded["used"]) & HEAVY


@pytest.mark.parametrize("stage", ["used", "export"])
def test_the_library_adds_only_its_own_modules_to_torchs(loaded, stage):
    assert packages(loaded[stage]) - sys.stdlib_module_names <= {"fogzo", "torch"}
    own = [module for module in loaded[stage] if module.startswith("fogzo.")]
    assert own
    assert all(module in LIBRARY for module in own)


def test_all_that_is_public_exists_and_has_a_docstring():
    assert len(set(fogzo.__all__)) == len(fogzo.__all__)
    assert set(fogzo.__all__) <= set(dir(fogzo))
    for name in fogzo.__all__:
        assert getattr(fogzo, name).__doc__


def test_what_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fogzo' has no attribute 'nothing'"):
        _ = fogzo.nothing
