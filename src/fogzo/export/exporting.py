"""Exporting: check, write beside, read back, compare, rename."""

import dataclasses
import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fogzo.export import holds
from fogzo.export.folder import folder_path
from fogzo.export.format_table import FORMATS
from fogzo.export.integers import largest_change
from fogzo.export.source import ActivationChoice, Options, Source
from fogzo.export.verify import ReadBack, difference, example_of, trained_answer
from fogzo.layers.bypasses import warn_of_bypassed_layers
from fogzo.wording import listed, nearest

logger = logging.getLogger(__name__)

# The module of each format.
MODULES: Mapping[str, str] = {
    "packed": "packed",
    "float": "float_folder",
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "onnx": "onnx",
    "mlx": "mlx",
    "bitnet": "bitnet",
}
REPORT = "export.json"
# In a folder beside the one that is written: the export until it is whole, and the one it replaces.
_NEW, _OLD = "new", "old"
# Sums in another order move bfloat16's logits by a hundredth, and now and then a rounded input.
_LARGE_DIFFERENCE = 0.05


@dataclass(frozen=True)
class LayerReport:
    """How one layer was written.

    Attributes:
        name: In the model.
        stored: The type in the file.
        bits: Per weight, with the scales.
        exact: Whether the reader's weight is the trained one, bit for bit; None if unverified.
        step_rounding: The largest relative change of a step size: by ``round_steps``, or where the
            reader divides by a rounded reciprocal of it (bitnet).
    """

    name: str
    stored: str
    bits: float
    exact: bool | None
    step_rounding: float


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what its reader makes of it.

    Attributes:
        format: Its name.
        folder: Where it is.
        layers: The quantized layers.
        files: Their paths in it, this report apart.
        bytes: Size of the files.
        float_bytes: Size of the tensors of the model in float.
        reader: With which it was read back; None if it was not.
        logits_difference: The largest difference between what the reader and the trained model
            answer to the example, relative to the largest finite logit; None if nothing was run,
            or no logit is a number.
        note: What was not verified, and why.
    """

    format: str
    folder: str
    layers: tuple[LayerReport, ...]
    files: tuple[str, ...]
    bytes: int
    float_bytes: int
    reader: str | None
    logits_difference: float | None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return dataclasses.asdict(self)


def check(
    model: nn.Module,
    format: str,
    *,
    round_steps: bool = False,
    activations: ActivationChoice = "keep",
    allow_wider: bool = False,
    variant: str | None = None,
) -> list[str]:
    """What keeps a model from being exported so; an empty list if nothing does.

    It writes nothing and needs no trained weights: ask before training starts. Weights that are
    not finite, or in their float phase (`fogzo.methods.quantize_from`), are listed as well.

    >>> import fogzo
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> model = fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: name == "0")
    >>> check(model, "packed")
    []
    >>> check(model, "gguf")[0]
    'gguf is written for LlamaForCausalLM only, got Sequential: format="packed" or "onnx"'
    """
    _check_format(format, FORMATS)
    options = Options(round_steps, activations, allow_wider, variant)
    return holds.problems(Source.of(model, options), format)


def export(
    model: nn.Module,
    folder: str | Path,
    format: str = "packed",
    *,
    example: Any = None,
    round_steps: bool = False,
    activations: ActivationChoice = "keep",
    allow_wider: bool = False,
    variant: str | None = None,
    tokenizer: Any = None,
    verify: bool = True,
) -> ExportReport:
    """Write a quantized model for a program that serves it, with the weights that were trained.

    The files appear all at once, and a folder of an earlier export is replaced. The model stays as
    it is.

    Args:
        model: Quantized, with its inputs calibrated if they are quantized.
        folder: To write into.
        format: One of `formats`.
        example: An input (a tensor, a tuple of arguments or a dict of keywords), on which what was
            written is compared with the model. By default one is made up for models of
            transformers that take it; onnx needs one of other models.
        round_steps: Round step sizes to what the format holds: codes stay, weights move a little.
        activations: ``"drop"`` exports the weights alone where the format holds no quantized
            inputs.
        allow_wider: Use more bits than the quantizer where the format has no narrower type.
        variant: Of a format that has several: a type of gguf (``"tq1_0"``), or ``"qdq"`` of onnx.
        tokenizer: A transformers tokenizer to write too: into a gguf file, beside other files.
        verify: Read the files back and compare.

    Returns:
        What was written, also in ``export.json`` beside it.

    Raises:
        ValueError: If the format cannot hold the model (see `check`), the model does not take the
            example, its weights or step sizes are
            not finite or not those of a quantized network yet, an input was never measured, the
            tokenizer is none or one that the format cannot say, or the folder holds something else.
            Nothing is written then.
        RuntimeError: If the files read back are not what was to be written, or their reader answers
            with numbers that are not finite where the model's are, or with other infinities.
            Nothing is kept.
    """
    _check_format(format, MODULES)
    folder = folder_path(folder, 'fogzo.export.export(model, "out")')
    source = Source.of(model, Options(round_steps, activations, allow_wider, variant))
    problems = holds.problems(source, format)
    if problems:
        more = f" (and {len(problems) - 1} more: fogzo.export.check)" if problems[1:] else ""
        raise ValueError(f"{problems[0]}{more}")
    _check_measured(source)
    _check_tokenizer(tokenizer)
    warn_of_bypassed_layers(source.model)
    final = Path(os.path.realpath(folder))  # a link to a folder stays one
    _check_replaceable(final)
    trained = {name: layer.weight for name, layer in source.layers.items()}
    source, rounding = _rounded(source, format)
    writer = import_module(f"fogzo.export.{MODULES[format]}")
    example = example_of(source.model) if example is None else example
    source = dataclasses.replace(source, example=example, tokenizer=tokenizer)
    with _beside(final) as partial:
        writer.write(source, partial)
        if tokenizer is not None and format != "gguf":
            tokenizer.save_pretrained(partial)
        reading, note = _read_back(writer, source, partial) if verify else (None, "not verified")
        if reading is not None:
            _check_weights(source, reading, format)
        layers = [
            LayerReport(
                name,
                chosen.name,
                chosen.bits_per_weight(source.layers[name].weight),
                None
                if reading is None
                else torch.equal(_cpu(reading.weights[name]), _cpu(trained[name].dequantize())),
                rounding[name],
            )
            for name in source.layers
            for chosen in [holds.stored(source, name, format)]
        ]
        gap = _compare_logits(source.model, example, reading)
        if not (round_steps and any(rounding.values())) and activations == "keep":
            _warn_of_difference(gap, reading)
        written = [path for path in partial.rglob("*") if path.is_file()]
        report = ExportReport(
            format,
            str(folder),
            tuple(layers),
            tuple(sorted(path.relative_to(partial).as_posix() for path in written)),
            sum(path.stat().st_size for path in written),
            _float_bytes(source),
            None if reading is None else reading.reader,
            gap,
            note,
        )
        text = json.dumps(report.to_dict(), indent=2) + "\n"
        (partial / REPORT).write_text(text, encoding="utf-8")
        _replace(partial, final)
    return report


def formats() -> tuple[str, ...]:
    """The names of the formats that `export` writes."""
    return tuple(MODULES)


def _check_format(format: str, known: Mapping[str, object]) -> None:
    if format not in known:
        close = nearest(format, known)
        hint = f"did you mean {close!r}?" if close else f"choose from {', '.join(known)}"
        raise ValueError(f"no format {format!r}: {hint}")


def _check_measured(source: Source) -> None:
    for name, layer in source.layers.items():
        if layer.input is not None and not layer.input.measured:
            raise ValueError(
                f"the input of {name!r} has no step size yet: measure it first, with "
                "fogzo.calibrate_(model): model(x). If no x brings it anything but zeros (it is "
                "not used, say), any small step will do: "
                f"model.get_submodule({name!r}).load_state_dict("
                '{"input_step": torch.full((1, 1), 1e-6)}, strict=False)'
            )


def _check_tokenizer(tokenizer: Any) -> None:
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained")):
        raise ValueError(
            f"tokenizer must be one of transformers, got {tokenizer!r:.80}: "
            "tokenizer=transformers.AutoTokenizer.from_pretrained('gpt2')"
        )


def _rounded(source: Source, format: str) -> tuple[Source, dict[str, float]]:
    """The source with steps that the format holds, and the largest relative change of each."""
    trained = {id(layer.weight): layer.weight for layer in source.layers.values()}
    variant = source.options.variant
    rounded = {k: holds.with_rounded_steps(w, format, variant) for k, w in trained.items()}
    weights = {name: rounded[id(layer.weight)] for name, layer in source.layers.items()}
    errors = {
        name: largest_change(layer.weight.scale, weights[name].scale)
        for name, layer in source.layers.items()
    }
    return source.with_weights(weights), errors


def _read_back(
    writer: ModuleType, source: Source, folder: Path
) -> tuple[ReadBack | None, str | None]:
    try:
        reading = writer.read_back(source, folder)
        return (
            reading,
            "not verified, as no reader in Python knows the type" if reading is None else None,
        )
    except ImportError as error:
        note = f"not verified, as its reader is not installed: pip install {error.name}"
        logger.warning("%s", note)
        return None, note


def _check_weights(source: Source, reading: ReadBack, format: str) -> None:
    for name, layer in source.layers.items():
        found, written = _cpu(reading.weights[name]), _cpu(layer.weight.dequantize())
        if not torch.equal(found.to(written.dtype), written):
            off = difference(found, written)
            raise RuntimeError(
                f"{reading.reader} reads {name!r} from the {format} files as other weights than "
                f"were written ({off:.1e} off, relative to the largest): nothing was kept. Please "
                "report it with the versions of the reader and of fogzo"
            )


def _compare_logits(model: nn.Module, example: Any, reading: ReadBack | None) -> float | None:
    if reading is None or reading.call is None or example is None:
        return None
    trained, found = trained_answer(model, example), reading.call(example)
    trained, found = _cpu(trained), _cpu(found)
    if trained.isnan().all():
        return None
    if not _are_alike(found, trained):
        raise RuntimeError(
            f"{reading.reader} answers to the example with {_described(found)}, expected "
            f"{_described(trained)} as from the model itself: nothing was kept. Please report it "
            "with the versions of the reader and of fogzo"
        )
    finite = trained.isfinite()  # infinities, as of masked classes, are equal
    return difference(found[finite], trained[finite]) if finite.any() else 0.0


def _are_alike(found: Tensor, trained: Tensor) -> bool:
    """Whether they have one shape, with finite numbers and equal infinities in the same places."""
    if found.shape != trained.shape:
        return False
    finite, infinite = trained.isfinite(), trained.isinf()
    return bool(found[finite].isfinite().all() and (found[infinite] == trained[infinite]).all())


def _warn_of_difference(gap: float | None, reading: ReadBack | None) -> None:
    """Say where equal weights answer otherwise, as with inputs that are quantized otherwise."""
    if reading is not None and gap is not None and gap > _LARGE_DIFFERENCE:
        logger.warning(
            "%s reads the weights that were trained, and still answers to the example with a "
            "difference of %.0f%% of the largest logit: compare both on your data before you "
            "serve it, and please report it with the versions of the reader and of fogzo",
            reading.reader,
            100 * gap,
        )


def _described(output: Tensor) -> str:
    finite = "finite" if output.isfinite().all() else "not all finite"
    return f"numbers of shape {tuple(output.shape)}, {finite}"


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _float_bytes(source: Source) -> int:
    others = {id(tensor): tensor.nbytes for tensor in source.other_tensors().values()}
    weights = {id(layer.weight): layer.module.weight.nbytes for layer in source.layers.values()}
    return sum((others | weights).values())


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    # Another folder is put in its place, which a shell that stands in it would not see.
    if os.path.ismount(folder) or os.path.samefile(folder, os.curdir):
        what = "a mount point" if os.path.ismount(folder) else "the current folder"
        raise ValueError(
            f"{folder} is {what}, and an export puts a folder in the place of another: "
            f"name one in it, {str(folder / 'export')!r}"
        )
    report = _report_in(folder)
    if report is not None:
        _check_own(folder, report)
    elif not folder.is_dir() or any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds something that no export wrote, and is left as it is: choose another "
            "folder"
        )


def _report_in(folder: Path) -> dict[str, Any] | None:
    """The report of an earlier export; None where there is none, or it is another's file."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    of_export = isinstance(report, dict) and {"format", "folder", "layers"} <= report.keys()
    return report if of_export else None


def _check_own(folder: Path, report: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if somebody has put files or folders into an earlier export."""
    if "files" not in report:  # an older fogzo did not list them
        return
    files = {folder / name for name in (REPORT, *report["files"])}
    own = files.union(*(file.parents for file in files))
    others = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p not in own)
    if others:
        raise ValueError(
            f"{folder} also holds {listed(others)}, which no export wrote and a new one would "
            "delete: move them elsewhere, or choose another folder"
        )


@contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """An empty folder to write into, on the same disk as `final`.

    It is in a folder of a name that nobody else has given, which is deleted at the end, as are
    those that killed exports to `final` have left.
    """
    prefix = f".{final.name}.fogzo-export-"
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f"{glob.escape(prefix)}*"):
        _delete(left, final)
    work = Path(tempfile.mkdtemp(dir=final.parent, prefix=prefix))
    try:
        partial = work / _NEW
        partial.mkdir()  # unlike `work`, for all whom the user lets read new folders
        yield partial
    finally:
        _delete(work, final)


def _replace(partial: Path, final: Path) -> None:
    """Put the new folder in the place of the old one, which is there until the last moment."""
    if final.exists():
        os.replace(final, partial.with_name(_OLD))
    os.replace(partial, final)


def _delete(work: Path, final: Path) -> None:
    """Delete what an export worked in, once the earlier folder is back if nothing replaced it."""
    old = work / _OLD
    if old.exists() and not final.exists():
        os.replace(old, final)
    shutil.rmtree(work)
