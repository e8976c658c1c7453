"""What an inspection finds: numbers by layer, as tensors need not be kept to know them."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerInspection:
    """The numbers of one quantized weight. Shares are of its weights, unless they say otherwise.

    Those that only a `Watch` can count are None in a single inspection, as are those that nobody
    asked for.

    Attributes:
        name: Of the layer; tied layers are listed once, by the first.
        weights: How many it has.
        levels: How many levels its grid has.
        scale: ``"fixed"``, ``"learned"`` or ``"dynamic"``.
        surrogate: The backward rule's name.
        step_size: The median one, in the weight's units.
        fp16_error: Largest relative error of a step size rounded to float16, as export stores
            half of it on grids without a zero; at most 4.9e-4 in float16's normal range.
        levels_used: ``2^H`` for the entropy H of its codes in bits: as many equally frequent
            levels would carry as much.
        masked: Share that gets no gradient, or less than a hundredth (the slope of the backward
            rule at the weight).
        dead: Share of output channels that are empty or have a gradient of exactly zero (in every
            step that a `Watch` saw) although they are not masked.
        empty: Share of output channels whose weights are all zero, or nothing beside those of the
            other channels.
        outgrown: The step size that its rule would measure now over the one in use, a mean over
            the groups that have one each and are not zero; None unless step sizes are kept and
            weights finite.
        near_thresholds: Of the weights within the range of levels, the share nearer to a threshold
            than a twentieth of the levels' distance: 0.1 where weights are spread evenly.
        flips: Share of codes that change per step.
        flips_back: Share of these changes that undo the weight's last one.
        moved: Mean distance by which a weight moves per step, in step sizes.
        frozen: Share that is masked and does not move.
        clipped: Share of the layer's input values that lie beyond the end levels by more than half
            a step size; of tied layers that of the one with most.
        agreement: Measured slope of the loss over the one that the layer's gradient predicts.
        agreement_error: Its standard error.
        not_finite: Share of its weights, or of its step sizes if that is more, that is not finite;
            the other numbers are those of the rest.
        trained: Whether its weight requires a gradient.
        evenly_spaced: Whether its levels are, as pulls to the grid need them.
        one_step: Whether the whole weight has one step size.
        input_scale: That of its input, ``"fixed"``, ``"learned"`` or ``"dynamic"``; None where it
            takes it in float.
    """

    name: str
    weights: int
    levels: int
    scale: str
    surrogate: str
    step_size: float
    fp16_error: float
    levels_used: float
    masked: float
    dead: float
    empty: float
    near_thresholds: float
    outgrown: float | None = None
    flips: float | None = None
    flips_back: float | None = None
    moved: float | None = None
    frozen: float | None = None
    clipped: float | None = None
    agreement: float | None = None
    agreement_error: float | None = None
    not_finite: float = 0.0
    trained: bool = True
    evenly_spaced: bool = True
    one_step: bool = True
    input_scale: str | None = None

    @property
    def bits_used(self) -> float:
        """Entropy of the codes over the bits of the grid."""
        return math.log2(self.levels_used) / math.log2(self.levels)

    @property
    def stuck(self) -> float:
        """Share that nothing brings back: counted, or masked where step sizes are fixed."""
        if self.frozen is not None:
            return self.frozen
        return self.masked if self.scale == "fixed" else 0.0


@dataclass(frozen=True, kw_only=True)
class InFloat:
    """A matrix of the model that is not quantized.

    Attributes:
        name: Of the parameter.
        weights: How many it has.
        reason: Why it is not; None for embeddings and output heads, which rarely are.
        selectable: Whether a `filter_fn` can have it quantized.
    """

    name: str
    weights: int
    reason: str | None = None
    selectable: bool = True


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        kind: A key of `fogzo.inspection.THRESHOLDS`, or ``"not_finite"``, ``"agreement"`` or
            ``"float_phase"``.
        severity: ``"high"`` where training is held back, ``"medium"`` where something is wasted or
            will surprise, ``"note"`` for what is no illness.
        layers: Those concerned and the number of each, worst first; none for the whole model.
        message: What was found, with the numbers.
        code: What to try, in Python.
        options: What to try, in options of ``fogzo train``; None if there is no such option.
    """

    kind: str
    severity: str
    layers: Sequence[Sequence[str | float]]
    message: str
    code: str
    options: str | None = None

    def __str__(self) -> str:
        return f"[{self.severity}] {self.message}. Try: {self.code}"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model's quantized layers at one moment. `str` makes a table and findings of it.

    Attributes:
        layers: In the order of the model.
        in_float: What is not quantized, largest first.
        step: Calls of `Watch.update` until then; None where there is no watch.
        counted: Steps over which changes were counted.
        float_phase: Whether the layers still compute in float (`fogzo.methods.quantize_from`).
        findings: What is wrong, the gravest first; a `Watch` takes its earlier inspections into
            account.
    """

    layers: Sequence[LayerInspection]
    in_float: Sequence[InFloat] = ()
    step: int | None = None
    counted: int = 0
    float_phase: bool = False
    findings: Sequence[Finding] = ()

    def __str__(self) -> str:
        said = [str(finding) for finding in self.findings] or ["No findings."]
        return "\n".join([self.table(), "", *said])

    def mean(self, key: str) -> float | None:
        """A number of the layers, weighted by how many weights they have; None if none has it.

        >>> layer = dict(levels=4, scale="fixed", surrogate="identity", step_size=1.0,
        ...              fp16_error=0.0, levels_used=4.0, dead=0.0, empty=0.0, near_thresholds=0.1)
        >>> found = Inspection(layers=[LayerInspection(name="a", weights=3, masked=0.4, **layer),
        ...                            LayerInspection(name="b", weights=1, masked=0.0, **layer)])
        >>> round(found.mean("masked"), 2)
        0.3
        """
        known = [(layer.weights, getattr(layer, key)) for layer in self.layers]
        known = [(size, value) for size, value in known if value is not None]
        if not known:
            return None
        return math.fsum(size * value for size, value in known) / sum(size for size, _ in known)

    def as_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dictionaries alone, as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Inspection":
        """From `as_dict`.

        Raises:
            ValueError: If it is none of an inspection.
        """
        found = _checked(cls, values)
        parts = {"layers": LayerInspection, "in_float": InFloat, "findings": Finding}
        for name, part in parts.items():
            found[name] = [part(**_checked(part, item)) for item in found.get(name, ())]
        return cls(**found)

    def table(self) -> str:
        """The numbers of the layers, in columns."""
        heading, *rows = self.cells()
        widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (heading, *rows)
        ]
        if self.in_float:
            items = [f"{item.name} ({item.weights:,})" for item in self.in_float[:3]]
            more = len(self.in_float) - len(items)
            lines.append(f"in float: {', '.join(items)}{f' and {more} more' if more else ''}")
        return "\n".join(line.rstrip() for line in lines)

    def cells(self) -> list[list[str]]:
        """A heading and a row for each layer; columns that no layer has a number for are left out.

        Beyond 40 layers, those in the middle are left out.
        """
        columns = [
            (title, show)
            for title, key, show in _COLUMNS
            if any(getattr(layer, key) is not None for layer in self.layers)
        ]
        rows = [[show(layer) for _, show in columns] for layer in self.layers]
        if len(rows) > 40:
            left = [f"... {len(rows) - 40} more", *[""] * (len(columns) - 1)]
            rows = [*rows[:20], left, *rows[-20:]]
        return [[title for title, _ in columns], *rows]


def percent(share: float) -> str:
    """A share in percent, with a decimal place where it is small.

    >>> [percent(share) for share in (0.384, 0.031, 0.0, 0.00004)]
    ['38%', '3.1%', '0%', '<0.1%']
    """
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.{1 if 0 < share < 0.0995 else 0}f}%"


def _share(key: str) -> Callable[[LayerInspection], str]:
    def show(layer: LayerInspection) -> str:
        value = getattr(layer, key)
        return "" if value is None else percent(value)

    return show


def _agreement(layer: LayerInspection) -> str:
    if layer.agreement is None or layer.agreement_error is None:
        return ""
    return f"{layer.agreement:.2f} ± {layer.agreement_error:.2f}"


_COLUMNS: list[tuple[str, str, Callable[[LayerInspection], str]]] = [
    ("layer", "name", lambda layer: layer.name),
    ("weights", "weights", lambda layer: f"{layer.weights:,}"),
    ("step size", "step_size", lambda layer: f"{layer.step_size:.2g} {layer.scale}"),
    ("outgrown", "outgrown", lambda n: "" if n.outgrown is None else f"{n.outgrown:.2g}"),
    ("levels used", "levels", lambda layer: f"{layer.levels_used:.3g} of {layer.levels}"),
    ("masked", "masked", _share("masked")),
    ("frozen", "frozen", _share("frozen")),
    ("dead channels", "dead", _share("dead")),
    ("near thresholds", "near_thresholds", _share("near_thresholds")),
    ("flips per step", "flips", _share("flips")),
    ("undone", "flips_back", _share("flips_back")),
    ("moved", "moved", lambda layer: "" if layer.moved is None else f"{layer.moved:.2g}"),
    ("inputs clipped", "clipped", _share("clipped")),
    ("agreement", "agreement", _agreement),
]


def _checked(cls: type, values: Any) -> dict[str, Any]:
    """Values of the fields of a record.

    Raises:
        ValueError: If a field is missing, unknown or of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"expected an object with the numbers of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(values.keys() - fields.keys())
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING
    )
    if unknown or missing:
        raise ValueError(
            f"this is no {cls.__name__}: {', '.join(unknown or missing)} is "
            f"{'unknown' if unknown else 'missing'}, as where another version wrote it"
        )
    for name, value in values.items():
        if not _fits(hints[name], value):
            raise ValueError(f"{name} of {cls.__name__} is {value!r:.60}, expected {hints[name]}")
    return dict(values)


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if typing.get_origin(hint) is not None:
        return isinstance(value, list | tuple)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)
