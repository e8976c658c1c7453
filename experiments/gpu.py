"""What only a GPU can show, in pieces of at most ten minutes that resume.

    make gpu
    python experiments/gpu.py --minutes 25 [--resume] [--only llama] [--miniature]

Pieces, in this order: the contract and giving-back tests on the device; the sections of `fogzo
bench` but for export, which is about CPUs; LLaMA-9M at full width on the bytes of Shakespeare;
DeiT-Tiny on CIFAR-10 at 32 pixels. Networks are compared as `fogzo compare` does it: STE, the
unmasked STE, the placebo and FOGZO, learning rates tuned on validation loss. Nothing is downloaded:
data are expected in data/, tests and packages here. fogzo need not be installed, and packages that
are missing are named at the start.

Each piece is a process of its own, which is interrupted when its minutes are over. With --resume
pieces that this code has finished on this machine are left alone and others go on: the benchmark
from its finished sections, comparisons from their finished runs, the tests anew. --miniature runs
all pieces in about a minute on any device, on embedded data, to show that they would run. Writes
experiments/gpu/results.json, with the hardware, and one folder per piece; the benchmark's has a
file for each section.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"
sys.path.insert(0, str(SOURCES))  # of this checkout, which need not be installed

MINUTES_PER_PIECE = 10.0
# Seconds for an interrupted piece to end by itself.
PATIENCE = 30
PIECES = ("tests", "bench", "llama", "deit")
# Modules that are imported by all pieces, by each, and by the miniatures of comparisons.
EVERYWHERE = ("torch", "numpy", "tyro", "filelock", "safetensors")
MODULES = {
    "tests": ("pytest",),
    "bench": ("transformers",),
    "llama": ("transformers", "scipy"),
    "deit": ("transformers", "scipy", "kornia", "datasets", "PIL"),
}
IN_MINIATURE = {"llama": ("transformers",), "deit": ("transformers", "sklearn")}
# The packages of modules that have other names.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def missing_packages(pieces: Iterable[str], miniature: bool) -> list[str]:
    """What pip has to install for these pieces, with the versions of pyproject.toml."""
    needed = MODULES | IN_MINIATURE if miniature else MODULES
    modules = dict.fromkeys([*EVERYWHERE, *(name for piece in pieces for name in needed[piece])])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = {item.partition(">=")[0]: item for items in listed for item in items}
    absent = [PACKAGES.get(name, name) for name in modules if find_spec(name) is None]
    return [requirements[name] for name in absent]


def main(given: list[str] | None = None) -> None:
    """Run the pieces one after another, each in a process."""
    arguments = parse(given)
    wanted = arguments.only or PIECES
    if absent := missing_packages(wanted, arguments.miniature):
        sys.exit(
            f"{', '.join(wanted)} need packages that this Python does not have: {sys.executable} "
            f"-m pip install {' '.join(repr(package) for package in absent)}"
        )
    # Here, as only now it is known that what they import is there.
    from fogzo_lab.comparison.run_cache import code_version
    from fogzo_lab.system.devices import find_device
    from fogzo_lab.system.environment import environment
    from fogzo_lab.system.json_files import dumps, write_text

    device = find_device(arguments.device)
    if device.type == "cpu" and not arguments.miniature:
        sys.exit("there is no GPU here: --miniature shows on a CPU that the pieces run")
    made_by = {"code": code_version(), **environment()}
    del made_by["date"]
    deadline = time.monotonic() + 60 * arguments.minutes
    path = arguments.output_dir / "results.json"
    pieces: dict[str, Any] = {}
    if arguments.resume and path.exists():
        earlier = json.loads(path.read_text("utf-8"))
        if earlier["miniature"] == arguments.miniature:  # of the other kind, nothing is finished
            pieces = earlier["pieces"]

    def is_finished(name: str) -> bool:
        piece = pieces.get(name, {})
        return piece.get("outcome") == "finished" and piece.get("made_by") == made_by

    for name in wanted:
        limit = min(60 * MINUTES_PER_PIECE, deadline - time.monotonic())
        if is_finished(name) or limit <= 0:
            continue
        before = pieces.get(name, {})
        spent = before["seconds"] if before.get("made_by") == made_by else 0.0
        found = run_piece(name, arguments, str(device), limit, spent)
        pieces[name] = found | {"made_by": made_by}
        results = {
            "environment": environment(),
            "miniature": arguments.miniature,
            "pieces": pieces,
        }
        write_text(path, dumps(results, indent=1) + "\n")
    left = [name for name in wanted if not is_finished(name)]
    if left:
        sys.exit(f"not finished: {', '.join(left)}; the same with --resume goes on")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """A process of a piece, which imports this checkout too."""
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})


def run_piece(
    name: str, arguments: argparse.Namespace, device: str, limit: float, before: float
) -> dict[str, Any]:
    """One piece in its own process, ended by Ctrl-C's signal when its time is over."""
    folder = arguments.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    program = str(Path(__file__).with_name("gpu_pieces.py"))
    command = [sys.executable, program, name, "--device", device]
    command += ["--output-dir", str(arguments.output_dir), "--workers", str(arguments.workers)]
    command += ["--miniature"] * arguments.miniature + ["--resume"] * arguments.resume
    began = time.monotonic()
    process = start(command)
    try:
        code = process.wait(limit)
        outcome = "failed" if code else "finished"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        code, outcome = process.returncode, "out of time"
    found: dict[str, Any] = {
        "outcome": outcome,
        "seconds": round(before + time.monotonic() - began, 1),
    }
    if outcome == "finished":
        found["found"] = json.loads((folder / "piece.json").read_text(encoding="utf-8"))
        if found["found"].get("failed"):  # tests, which are to run again
            found["outcome"] = "failed"
    elif outcome == "failed":
        found["exit_code"] = code
    return found


def parse(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--only", choices=PIECES, action="append")
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=4, help="training runs at a time")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "gpu")
    arguments = parser.parse_args(given)
    arguments.output_dir = arguments.output_dir.resolve()
    return arguments


if __name__ == "__main__":
    main()
