"""What only a GPU can show, in pieces of at most ten minutes that resume.

    make gpu
    python experiments/gpu.py --minutes 25 [--resume] [--only llama] [--miniature]

Pieces, in this order: the contract and giving-back tests on the device; `fogzo bench`; LLaMA-9M at
full width on the bytes of Shakespeare; DeiT-Tiny on CIFAR-10 at 32 pixels. Networks are compared
as `fogzo compare` does it: STE, the unmasked STE, the placebo and FOGZO, learning rates tuned on
validation loss. Nothing is downloaded: data are expected in data/, tests and packages here.

Each piece is a process of its own, which is interrupted when its minutes are over. With --resume
finished pieces are left alone and others go on: comparisons from their finished runs, the rest
anew. --miniature runs all pieces in about a minute on any device, on embedded data, to show that
they would run. Writes experiments/gpu/results.json, with the hardware, and one folder per piece.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fogzo_lab.bench.config import BenchConfig
from fogzo_lab.bench.suite import run_suite
from fogzo_lab.comparison.compare import CompareConfig, compare
from fogzo_lab.data.config import ImagesConfig, TextConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.devices import find_device
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.model_config import QuantizerConfig

ROOT = Path(__file__).parent.parent
MINUTES_PER_PIECE = 10.0
# Seconds for an interrupted piece to end by itself.
PATIENCE = 30
TESTS = ("tests/estimators/test_contract.py", "tests/probing/test_giving_back.py")
ROWS = ("ste", "ste-unmasked", "placebo", "fogzo")


@dataclass(frozen=True)
class Setting:
    """How the pieces run.

    Attributes:
        folder: Of the piece.
        device: Such as cuda.
        miniature: Whether to show only that it runs.
        workers: Training runs at a time, all on the one device.
    """

    folder: Path
    device: str
    miniature: bool
    workers: int


def tests(setting: Setting) -> dict[str, Any]:
    """The suites that say what an estimator promises, with all tensors on the device."""
    report = setting.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TESTS]
    command += ["--device", setting.device, "-p", "no:cacheprovider"]
    if setting.miniature:
        command += ["-k", "flip_rate_counts or stateless"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    suite = ET.parse(report).getroot()
    suite = suite if suite.tag == "testsuite" else suite[0]
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if not counts["tests"]:
        raise RuntimeError(f"pytest ran no test and ended with {code}")
    return counts | {"failed": failed}


def bench(setting: Setting) -> dict[str, Any]:
    """What steps, layers and probes cost there."""
    config = BenchConfig(
        suite="tiny" if setting.miniature else "full",
        only=("steps",) if setting.miniature else (),
        device=setting.device,
        output_dir=setting.folder,
    )
    results = run_suite(config, lambda *_: None)
    write_text(setting.folder / "results.json", dumps(results, indent=1) + "\n")
    return {"sections": sorted(results["sections"])}


def llama(setting: Setting) -> dict[str, Any]:
    """LLaMA-9M's four blocks of width 128, with bytes instead of its 32,000 tokens."""
    recipe = RECIPES["llama-9m"]()
    base = replace(
        recipe,
        model=replace(recipe.model, vocab_size=None),
        data=TextConfig(dataset="data/shakespeare/input.txt", context=256, max_eval_blocks=512),
        quantizer=QuantizerConfig(preset="fixed", bits=2, surrogate="identity"),
        max_steps=3000,
        batch_size=64,
        accumulation=1,
        learning_rate=3.16e-3,
        kappa=0.01,
        log_every=50,
    )
    return compared(base, setting)


def deit(setting: Setting) -> dict[str, Any]:
    """DeiT-Tiny in full, patches of 4 on 32 pixels."""
    recipe = RECIPES["deit-tiny"]()
    base = replace(
        recipe,
        model=replace(recipe.model, patch_size=4),
        data=replace(
            recipe.data,
            dataset="data/cifar10",
            image_size=32,
            validation_fraction=0.1,
            augmentation=replace(recipe.data.augmentation, crop="pad", rand_augment=0),
            workers=2,
        ),
        quantizer=QuantizerConfig(preset="fixed", bits=2, surrogate="identity"),
        max_steps=4000,
        batch_size=256,
        learning_rate=1e-3,
        kappa=0.01,
        log_every=50,
    )
    return compared(base, setting)


def compared(base: TrainConfig, setting: Setting) -> dict[str, Any]:
    """Tune and compare; finished runs are kept."""
    base = replace(base, output_dir=setting.folder, device=setting.device)
    if setting.miniature:
        small = base.model
        data = (
            TextConfig(context=16, max_eval_blocks=4)
            if base.data.kind == "text"
            else ImagesConfig(max_eval_images=64)
        )
        if small.family == "deit":
            small = replace(small, width=32, depth=1, heads=2, patch_size=2)
        else:
            small = replace(small, width=32, depth=1)
        base = replace(
            base, model=small, data=data, max_steps=3, batch_size=8, log_every=1, precision="fp32"
        )
    rates = (base.learning_rate, base.learning_rate * 10**0.5)
    config = CompareConfig(
        base=base,
        rows=ROWS[-2:] if setting.miniature else ROWS,
        learning_rates=rates[:1] if setting.miniature else rates,
        num_seeds=1 if setting.miniature else 3,
        tuning_seeds=1,
        equal_time=False,
        workers=setting.workers,
    )
    found = compare(config)
    metric = found.main_metric
    return {"metric": metric.key} | {
        row.name: {"learning_rate": row.learning_rate, "seeds": row.values(metric.key)}
        for row in found.rows
    }


PIECES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "tests": tests,
    "bench": bench,
    "llama": llama,
    "deit": deit,
}


def main(given: list[str] | None = None) -> None:
    """Run the pieces one after another, each in a process."""
    arguments = parse(given)
    folder: Path = arguments.output_dir
    if arguments.piece:
        setting = Setting(
            folder / arguments.piece, arguments.device, arguments.miniature, arguments.workers
        )
        found = PIECES[arguments.piece](setting)
        write_text(setting.folder / "piece.json", dumps(found, indent=1) + "\n")
        return
    device = find_device(arguments.device)
    if device.type == "cpu" and not arguments.miniature:
        sys.exit("there is no GPU here: --miniature shows on a CPU that the pieces run")
    deadline = time.monotonic() + 60 * arguments.minutes
    path = folder / "results.json"
    kept = arguments.resume and path.exists()
    pieces = json.loads(path.read_text(encoding="utf-8"))["pieces"] if kept else {}
    for name in arguments.only or PIECES:
        limit = min(60 * MINUTES_PER_PIECE, deadline - time.monotonic())
        before = pieces.get(name, {})
        if before.get("outcome") == "finished" or limit <= 0:
            continue
        pieces[name] = run_piece(name, arguments, str(device), limit, before.get("seconds", 0.0))
        results = {
            "environment": environment(),
            "miniature": arguments.miniature,
            "pieces": pieces,
        }
        write_text(path, dumps(results, indent=1) + "\n")
    left = [name for name in PIECES if pieces.get(name, {}).get("outcome") != "finished"]
    if left and not arguments.only:
        sys.exit(f"not finished: {', '.join(left)}; the same with --resume goes on")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """A process of a piece."""
    return subprocess.Popen(command, cwd=ROOT)


def run_piece(
    name: str, arguments: argparse.Namespace, device: str, limit: float, before: float
) -> dict[str, Any]:
    """One piece in its own process, ended by Ctrl-C's signal when its time is over."""
    folder = arguments.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--piece", name, "--device", device]
    command += ["--output-dir", str(arguments.output_dir), "--workers", str(arguments.workers)]
    command += ["--miniature"] * arguments.miniature
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
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    arguments.output_dir = arguments.output_dir.resolve()
    return arguments


if __name__ == "__main__":
    main()
