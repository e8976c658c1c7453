"""The rows of a comparison: what each changes in the recipe, and what it is called.

A new row is one entry of `ROWS`. A row may change how gradients are made, and nothing else: seeds,
initial weights, batches and learning rates are the comparison's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from fogzo.wording import nearest
from fogzo_lab.training.config import Perturbation, TrainConfig
from fogzo_lab.training.model_config import QuantizerConfig

Change = Callable[[TrainConfig], TrainConfig]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        label: Its name for people.
        meaning: What it is, in a few words.
        change: What it makes of the recipe.
        has_kappa: Whether it follows kappa, which is then tuned over the grid of kappas.
        quantized_after: Whether it trains nothing and quantizes the float row's runs instead.
    """

    label: str
    meaning: str
    change: Change
    has_kappa: bool = False
    quantized_after: bool = False


def _to(**changes: Any) -> Change:
    return lambda recipe: replace(recipe, **changes)


def _quantizer(**changes: Any) -> Change:
    return lambda recipe: replace(
        recipe, estimator="ste", quantizer=replace(recipe.quantizer, **changes)
    )


# One checkpoint at the end, for the row that is quantized from it.
_float = _to(
    estimator="ste",
    quantizer=QuantizerConfig(),
    activations=QuantizerConfig(),
    checkpoint_every=0,
)
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
    "placebo": Row(
        "placebo",
        "STE plus noise of FOGZO's law and size, no loss measured",
        _to(estimator="placebo"),
        has_kappa=True,
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
        has_kappa=True,
    ),
    "fogzo-one-sided": Row(
        "FOGZO, one-sided",
        "FOGZO with differences from the step's own loss, half the forward passes",
        _to(estimator="fogzo", one_sided=True),
        has_kappa=True,
    ),
    "fogzo-eighth": Row(
        "FOGZO, an eighth of the batch",
        "FOGZO whose probes see an eighth of the batch",
        _to(estimator="fogzo", probe_fraction=0.125),
        has_kappa=True,
    ),
    "fogzo-every-4": Row(
        "FOGZO, every 4th step",
        "FOGZO in every fourth step, STE between",
        _to(estimator="fogzo", probe_every=4),
        has_kappa=True,
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
        has_kappa=True,
    ),
    **{
        f"fogzo-{law}": Row(
            f"FOGZO, {law} noise",
            f"FOGZO with {law} noise of the same radius",
            _to(estimator="fogzo", perturbation=law),
            has_kappa=True,
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
            close = nearest(name, ROWS)
            hint = f"did you mean --rows {close}?" if close else "for example --rows ste fogzo"
            raise ValueError(f"no such row: {name}; {hint} Choose from {', '.join(ROWS)}")
    if len(set(names)) < len(names):
        raise ValueError(
            f"a row is given twice in {' '.join(names)}: --rows {' '.join(dict.fromkeys(names))}"
        )
