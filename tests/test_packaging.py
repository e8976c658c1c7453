"""The wheel that users would install."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_its_types_and_its_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "fogzo/__init__.py",
        "fogzo/py.typed",
        "fogzo_lab/comparison/report.html.jinja",
    } <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "experiments"))]


def test_the_wheel_trains_without_the_checkout(wheel, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, fogzo;"
        "assert fogzo.__file__.startswith(sys.argv[1]), fogzo.__file__;"
        "m = fogzo.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4)), fogzo.lsq(2),"
        " lambda module, name: True);"
        "e = fogzo.FogzoEstimator(fogzo.quantized_weights(m), noise_share=0.1);"
        "x = torch.ones(2, 4); m(x).sum().backward(); print(e.refine_grads_(lambda: m(x).sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, wheel], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "agreement" in done.stdout


def test_metadata_asks_for_torch_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = archive.read(name).decode()
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in needs if "extra ==" not in line] == ["Requires-Dist: torch>=2.6"]
    assert "License-Expression: Apache-2.0" in metadata
