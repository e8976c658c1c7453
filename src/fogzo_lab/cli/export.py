"""fogzo export: a run's network in the format of a program that serves it."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from fogzo.export import ExportReport, export, formats
from fogzo.export.format_table import FORMATS
from fogzo_lab.cli import display
from fogzo_lab.cli.parsing import parse
from fogzo_lab.data.batches import load
from fogzo_lab.data.tokens import pretrained_tokenizer
from fogzo_lab.options import Example, OneOf, Options, PathOrName
from fogzo_lab.system.json_files import dumps
from fogzo_lab.table import Table, in_digits
from fogzo_lab.training.checkpoint_format import run_of, step_of
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.models import build_model
from fogzo_lab.training.run_folder import check_not_in_float, read_quantized_config
from fogzo_lab.training.state import load_weights
from fogzo_lab.training.tasks import Task, load_task

_LOG = logging.getLogger(__name__)

_VARIANTS = tuple(name for rules in FORMATS.values() for name in rules.variants)
_Variant = Annotated[str, OneOf(_VARIANTS)]
# Of `export`, as errors show them to those who call it from Python.
_ARGUMENT = re.compile(
    r"\b(format|variant|activations|tokenizer|allow_wider|round_steps)="
    r'("[\w-]+"(?: or "[\w-]+")?|True|None)'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(Options):
    """The export of a run's newest checkpoint, or of a given one, with the trained integers.

    The weights are averaged ones if the run averaged them. What was written is read back, and
    weights and outputs are compared with the trained network's.
    """

    run: tyro.conf.Positional[Annotated[Path, Example("runs/digits-mlp")]]
    """The --output-dir of the run, or one of its checkpoints."""
    format: Annotated[str, OneOf(formats())] = "packed"
    """The format to write."""
    output: Annotated[Path | None, Example("exported")] = None
    """The folder to write; by default export/FORMAT in the run's."""
    round_steps: bool = False
    """Round step sizes to what the format holds; codes stay, weights move a little."""
    activations: Literal["keep", "drop"] = "keep"
    """drop exports the weights alone, where the format cannot hold quantized inputs."""
    allow_wider: bool = False
    """Use more bits than the quantizer, where the format has no narrower type."""
    variant: Annotated[_Variant | None, Example("tq1_0")] = None
    """A type of gguf (tq1_0, q1_0, ...), or a style of onnx (nbits, qdq) or of bitnet (bitlinear,
    autobitlinear)."""
    tokenizer: Annotated[PathOrName, Example("none")] = "auto"
    """The tokenizer to write too: auto takes the run's own, none leaves it out; or a hub id or a
    folder with tokenizer.json."""
    verify: bool = True
    """Read the files back and compare."""
    json: bool = False
    """Print the report as JSON."""


def run(arguments: Sequence[str]) -> None:
    """Run the command with these options."""
    from transformers.utils.logging import disable_progress_bar  # here, as it takes a second

    config = parse(ExportConfig, arguments, "fogzo export", ExportConfig.__doc__)
    disable_progress_bar()  # of loading what was written; it would go between the lines here
    try:
        report = export_run(config)
    except ValueError as error:
        raise ValueError(_in_options(str(error))) from error
    if config.json:
        print(dumps(report.to_dict()))
        return
    table = report_table(report)
    display.print_table(table, table.title)
    print(table.caption)


def export_run(config: ExportConfig) -> ExportReport:
    """Export the network of a run.

    Raises:
        ValueError: If there is no such run, or the format cannot hold its network.
    """
    folder = config.run if step_of(config.run) is None else run_of(config.run)
    settings = read_quantized_config(folder, "export")
    task = load_task(settings)
    model = build_model(settings, task.shapes)
    step = load_weights(model, config.run)
    check_not_in_float(settings, config.run, step)
    if step < settings.max_steps:
        _LOG.warning("exporting the weights of step %d of %d", step, settings.max_steps)
    return export(
        model.eval(),
        config.output or folder / "export" / config.format,
        config.format,
        example=_example(task),
        round_steps=config.round_steps,
        activations=config.activations,
        allow_wider=config.allow_wider,
        variant=config.variant,
        tokenizer=_tokenizer(config.tokenizer, settings),
        verify=config.verify,
    )


def report_table(report: ExportReport) -> Table:
    """The layers of an export, and in the caption its size and what its reader answered."""
    rounded = any(layer.step_rounding for layer in report.layers)
    heading = ["layer", "stored as", "bits per weight", "exact"]
    heading += ["steps rounded by"] if rounded else []
    rows = [
        [
            layer.name,
            layer.stored,
            f"{layer.bits:.3g}",
            {None: "not verified", True: "yes", False: "no"}[layer.exact],
            *([f"{layer.step_rounding:.1e}"] if rounded else []),
        ]
        for layer in report.layers
    ]
    size, in_float = report.bytes / 1e6, report.float_bytes / 1e6
    caption = f"{report.folder}: {in_digits(size, 3)} MB; the model in float is "
    caption += f"{in_digits(in_float, 3)} MB"
    if report.logits_difference is not None:
        caption += (
            f"\n{report.reader}: logits differ by {report.logits_difference:.2g} of the largest"
        )
    if report.note is not None:
        caption += f"\n{report.note}"
    return Table(f"{report.format} export", heading, rows, caption)


def _in_options(message: str) -> str:
    """What the library says of its arguments, in this command's options.

    >>> _in_options('rounded by round_steps=True: train with bits=2, or format="float" or "onnx"')
    'rounded by --round-steps: train with bits=2, or --format float or onnx'
    """

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        value = {"True": "", "None": "none"}.get(value, value.replace('"', ""))
        return f"--{name.replace('_', '-')} {value}".rstrip()

    return _ARGUMENT.sub(option, message)


def _tokenizer(name: str, settings: TrainConfig) -> Any:
    """As transformers has it; None of a network of images or bytes.

    Raises:
        ValueError: If there is no such tokenizer.
    """
    if name == "auto":
        name = settings.data.tokenizer if settings.data.kind == "text" else "none"
    if name in ("none", "bytes"):
        return None
    return pretrained_tokenizer(name, "--tokenizer", "none")


def _example(task: Task) -> Tensor:
    """Inputs that show whether an exported network answers as the trained one does."""
    split = task.splits["validation"]
    raw = next(load(split, [torch.arange(min(len(split), 4))]))
    inputs, _ = task.prepare(raw, torch.device("cpu"), training=False)
    return inputs
