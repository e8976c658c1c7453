"""The rows of a comparison: what each changes in the recipe, and what it is called.

A new row is one entry of `ROWS`. A row may change how weights are quantized and trained, and
nothing else: seeds, initial weights, batches and learning rates are the comparison's. It may have
one parameter of its own, which is tuned beside the learning rate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from fogzo.wording import nearest
from fogzo_lab.training.config import Perturbation, TrainConfig
from fogzo_lab.training.method_config import PUBLISHED, MethodConfig, MethodName
from fogzo_lab.training.model_config import QuantizerConfig

Change = Callable[[TrainConfig], TrainConfig]


@dataclass(frozen=True)
class Parameter:
    """A row's own parameter.

    Attributes:
        name: For people and files.
        put: A config with a value of it.
        grid: The values that are tried; empty for kappa, whose grid is the comparison's.
        published: The authors' value; None for kappa, for which the recipe's stands.
    """

    name: str
    put: Callable[[TrainConfig, float], TrainConfig]
    grid: tuple[float, ...] = ()
    published: float | None = None


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        label: Its name for people.
        meaning: What it is, in a few words.
        change: What it makes of the recipe.
        parameter: What is tuned beside the learning rate; None for nothing.
        quantized_after: Whether it trains nothing and quantizes the float row's runs instead.
    """

    label: str
    meaning: str
    change: Change
    parameter: Parameter | None = None
    quantized_after: bool = False

    def config(self, recipe: TrainConfig, value: float | None) -> TrainConfig:
        """What is trained, with that value of the row's own parameter."""
        changed = self.change(recipe)
        if self.parameter is None or value is None:
            return changed
        return self.parameter.put(changed, value)


def _to(**changes: Any) -> Change:
    return lambda recipe: replace(recipe, **changes)


def _quantizer(**changes: Any) -> Change:
    return lambda recipe: replace(
        recipe, estimator="ste", quantizer=replace(recipe.quantizer, **changes)
    )


def _method(name: MethodName, **options: Any) -> Change:
    return _to(estimator="ste", method=MethodConfig(name=name, **options))


def _option(method: MethodName, name: str, *grid: float) -> Parameter:
    """An option of a method, tuned."""

    def put(config: TrainConfig, value: float) -> TrainConfig:
        option: Any = {name: value}
        return replace(config, method=replace(config.method, **option))

    return Parameter(name.replace("_", " "), put, grid, PUBLISHED[method][name])


def _bbq(recipe: TrainConfig) -> TrainConfig:
    """BBQ's quantizer of as many bits, with a step per channel and a basis of its own."""
    bits, quantizer = recipe.quantizer.bits, recipe.quantizer.build()
    if bits is None and quantizer is not None:  # those of a sign are 1, and of a preset its own
        bits = math.ceil(math.log2(quantizer.grid.num_levels))
    return replace(recipe, quantizer=QuantizerConfig(preset="bbq", bits=bits))


# One checkpoint at the end, for the row that is quantized from it.
_float = _to(
    estimator="ste",
    quantizer=QuantizerConfig(),
    activations=QuantizerConfig(),
    quantize_from=0.0,
    method=MethodConfig(),
    checkpoint_every=0,
)
KAPPA = Parameter("kappa", lambda config, value: replace(config, kappa=value))
_LAWS = [law for law in get_args(Perturbation) if law != "auto"]

ROWS: dict[str, Row] = {
    "float": Row("float", "no quantization", _float),
    "ptq": Row(
        "PTQ",
        "the float row's networks, quantized after training",
        _float,
        quantized_after=True,
    ),
    "ste": Row("STE", "the recipe's straight-through estimator", _to(estimator="ste")),
    "ste-unmasked": Row(
        "STE, unmasked", "STE with slope 1 everywhere", _quantizer(surrogate="identity_unmasked")
    ),
    "ste-stochastic": Row(
        "STE, stochastic", "STE with weights rounded at random", _quantizer(stochastic=True)
    ),
    "ste-drawn": Row(
        "STE, drawn",
        "STE without a mask, weights rounded at random",
        _quantizer(surrogate="identity_unmasked", stochastic=True),
    ),
    "ste-drawn-adjacent": Row(
        "STE, drawn, adjacent",
        "weights rounded at random, with the slope of the level that was drawn",
        _quantizer(surrogate="adjacent", stochastic=True),
    ),
    "placebo": Row(
        "placebo",
        "STE plus noise of FOGZO's law and size, no loss measured",
        _to(estimator="placebo"),
        parameter=KAPPA,
    ),
    "lambda": Row(
        "lambda only",
        "STE times the measured agreement, no noise (beta = 1)",
        _to(estimator="lambda"),
    ),
    "fogzo": Row(
        "FOGZO",
        "the measured slopes along STE's direction plus noise",
        _to(estimator="fogzo"),
        parameter=KAPPA,
    ),
    "fogzo-one-sided": Row(
        "FOGZO, one-sided",
        "FOGZO with differences from the step's own loss, half the forward passes",
        _to(estimator="fogzo", one_sided=True),
        parameter=KAPPA,
    ),
    "fogzo-eighth": Row(
        "FOGZO, an eighth of the batch",
        "FOGZO whose probes see an eighth of the batch",
        _to(estimator="fogzo", probe_fraction=0.125),
        parameter=KAPPA,
    ),
    "fogzo-every-4": Row(
        "FOGZO, every 4th step",
        "FOGZO in every fourth step, STE between",
        _to(estimator="fogzo", probe_every=4),
        parameter=KAPPA,
    ),
    "fogzo-linear": Row(
        "FOGZO, linearized",
        "FOGZO whose slopes are predicted by backward's gradient, no forward pass",
        _to(estimator="fogzo", probe_loss="linear"),
        parameter=KAPPA,
    ),
    "control-variate": Row(
        "control variate",
        "STE plus what the measured slopes add to its prediction",
        _to(estimator="control-variate"),
    ),
    # Without a gradient to follow, its noise cannot be shaped.
    "spsa": Row(
        "n-SPSA",
        "the measured slopes along noise alone",
        _to(estimator="spsa", noise_shape="isotropic"),
    ),
    "ste-then-fogzo": Row(
        "70% STE, then FOGZO",
        "FOGZO in the last 30% of the steps",
        _to(estimator="fogzo", start=0.7),
        parameter=KAPPA,
    ),
    "ste-stable-qat": Row(
        "STE, StableQAT's slope",
        "STE with a slope that is large at thresholds and small at levels",
        _quantizer(surrogate="stable_qat"),
    ),
    "ste-bbq": Row(
        "STE, BBQ",
        "STE on BBQ's quantizer of as many bits: rotated, codes of equal frequency",
        lambda recipe: replace(_bbq(recipe), estimator="ste"),
    ),
    "fogzo-bbq": Row(
        "FOGZO on BBQ",
        "FOGZO on BBQ's quantizer of as many bits",
        lambda recipe: replace(_bbq(recipe), estimator="fogzo"),
        parameter=KAPPA,
    ),
    "float-then-ste": Row(
        "float, then STE",
        "half of the steps in float, then plain STE",
        # Not every method could wait that long.
        _to(estimator="ste", quantize_from=0.5, method=MethodConfig()),
    ),
    "float-then-fogzo": Row(
        "float, then FOGZO",
        "half of the steps in float, then FOGZO",
        _to(estimator="fogzo", quantize_from=0.5, method=MethodConfig()),
        parameter=KAPPA,
    ),
    "ste-cage": Row(
        "STE, CAGE",
        "STE with a pull to the grid that grows over the run",
        _method("cage", start=0.0),
        _option("cage", "strength", 1.0, 10.0, 100.0),
    ),
    "ste-cage-published": Row(
        "STE, CAGE as published",
        "STE with a pull to the grid in the last fifth of the steps",
        _method("cage"),
    ),
    "ste-winq": Row(
        "STE, WinQ",
        "STE with ten resets of the weights towards the grid",
        _method("winq", resets=10),
        _option("winq", "keep", 0.2, 0.5, 0.8),
    ),
    "ste-winq-published": Row(
        "STE, WinQ as published",
        "STE with four resets of the weights, most of the way to the grid",
        _method("winq"),
    ),
    "ste-dampening": Row(
        "STE, dampening",
        "STE plus the gradient of a penalty on the distance from the grid",
        _method("dampening", mean_over_inputs=False),
        _option("dampening", "strength", 1e-3, 1e-2, 1e-1),
    ),
    "ste-dampening-published": Row(
        "STE, dampening as published",
        "STE plus the gradient of the penalty divided by the inputs of an output",
        _method("dampening"),
    ),
    "ste-cewt": Row(
        "STE, CEWT",
        "STE with weights that keep their norm and a Gaussian distribution",
        _method("cewt"),
        _option("cewt", "rate_factor", 2.5, 8.33, 25.0),
    ),
    "parq": Row(
        "PARQ",
        "torchao's PARQ on as many bits: unquantized layers, weights drawn to levels of its own",
        _method("parq"),
        _option("parq", "steepness", 1.0, 10.0, 20.0),
    ),
    **{
        f"fogzo-{law}": Row(
            f"FOGZO, {law} noise",
            f"FOGZO with {law} noise of the same radius",
            _to(estimator="fogzo", perturbation=law),
            parameter=KAPPA,
        )
        for law in _LAWS
    },
}
"""Every row by its name on the command line."""


def check_rows(names: Sequence[str]) -> None:
    """Check names of rows.

    Raises:
        ValueError: If one is unknown or given twice, or there is none.
    """
    if not names:
        raise ValueError(
            f"no such row: none given; choose from {', '.join(ROWS)}, for example --rows ste fogzo"
        )
    for name in names:
        if name not in ROWS:
            listed = " ".join(name.split(","))  # other programs take lists with commas
            close = listed if listed != name else nearest(name, ROWS)
            hint = f"did you mean --rows {close}?" if close else "for example --rows ste fogzo."
            raise ValueError(f"no such row: {name}; {hint} Choose from {', '.join(ROWS)}")
    if len(set(names)) < len(names):
        raise ValueError(
            f"a row is given twice in {' '.join(names)}: --rows {' '.join(dict.fromkeys(names))}"
        )
