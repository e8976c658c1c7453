"""The pieces of gpu.py, each in a process of its own: what needs the laboratory and its packages.

Such as ``python experiments/gpu_pieces.py bench --device cuda:0 --output-dir experiments/gpu``.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fogzo_lab.bench.config import SECTION_NAMES, BenchConfig
from fogzo_lab.bench.suite import run_suite
from fogzo_lab.comparison.compare import CompareConfig, compare
from fogzo_lab.data.config import ImagesConfig, TextConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.model_config import QuantizerConfig

ROOT = Path(__file__).parent.parent
TESTS = ("tests/estimators/test_contract.py", "tests/probing/test_giving_back.py")
ROWS = ("ste", "ste-unmasked", "placebo", "fogzo")
# A comparison goes on from its finished runs, so that one has to end within a piece: 75 s at the 20
# steps a second of a modern GPU, 5 minutes where four runs share it and slow each other down.
STEPS = 1500


@dataclass(frozen=True)
class Setting:
    """How the pieces run.

    Attributes:
        folder: Of the piece.
        device: Such as cuda:0.
        miniature: Whether to show only that it runs.
        workers: Training runs at a time, all on the one device.
        resume: Whether to go on from the sections of the benchmark that are finished.
    """

    folder: Path
    device: str
    miniature: bool
    workers: int
    resume: bool


def tests(setting: Setting) -> dict[str, Any]:
    """The suites that say what an estimator promises, with all tensors on the device."""
    report = setting.folder / "tests.xml"
    report.unlink(missing_ok=True)  # of an earlier try, whose result is not this one's
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TESTS]
    command += ["--device", setting.device, "-p", "no:cacheprovider"]
    if setting.miniature:
        command += ["-k", "flip_rate_counts or stateless"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code not in (0, 1) or not report.exists():  # neither passed nor failed
        raise RuntimeError(
            f"pytest ended with {code} before it had run all tests: mend what it says above, then "
            "python experiments/gpu.py --resume"
        )
    suite = ElementTree.parse(report).getroot()
    suite = suite if suite.tag == "testsuite" else suite[0]
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | {"failed": failed}


def bench(setting: Setting) -> dict[str, Any]:
    """What steps, layers and probes cost there: a file for each section, as soon as it is measured.

    What exported networks cost is left out, as CPUs serve them.
    """
    suite = "tiny" if setting.miniature else "full"
    names = [name for name in SECTION_NAMES if name != "export"]
    paths = {name: setting.folder / f"{name}.json" for name in names}
    if not setting.resume:
        for path in paths.values():
            path.unlink(missing_ok=True)
    seconds = {}
    for name in names[:1] if setting.miniature else names:
        found = json.loads(paths[name].read_text("utf-8")) if paths[name].exists() else None
        if found is None or found["suite"] != suite:
            config = BenchConfig(
                suite=suite, only=(name,), device=setting.device, output_dir=setting.folder
            )
            found = run_suite(config)
            write_text(paths[name], dumps(found, indent=1) + "\n")
        seconds[name] = round(found["sections"][name]["seconds"], 1)
    return {"seconds_of_sections": seconds}


def llama(setting: Setting) -> dict[str, Any]:
    """LLaMA-9M's four blocks of width 128, with bytes instead of its 32,000 tokens."""
    recipe = RECIPES["llama-9m"]()
    base = replace(
        recipe,
        model=replace(recipe.model, vocab_size=None),
        data=TextConfig(dataset="data/shakespeare/input.txt", context=256, max_eval_blocks=512),
        quantizer=QuantizerConfig(preset="fixed", bits=2, surrogate="identity"),
        max_steps=STEPS,
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
        max_steps=STEPS,
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


def main() -> None:
    """Run one piece, and write what it found into its folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--device", required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--miniature", action="store_true")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    folder = given.output_dir / given.piece
    setting = Setting(folder, given.device, given.miniature, given.workers, given.resume)
    found = PIECES[given.piece](setting)
    write_text(folder / "piece.json", dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
