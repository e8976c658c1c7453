"""Options of the refinements that would fail, or say two things, only once training begins."""

from collections.abc import Mapping
from typing import Any

from fogzo.estimators import GradientEstimator


def check_class(call: str, estimator: object) -> None:
    """Refuse an estimator that is made already.

    Args:
        call: How the refinement is asked for, up to its first option.
        estimator: A member of the family.

    Raises:
        ValueError: If it is no class.
    """
    if not (isinstance(estimator, type) and issubclass(estimator, GradientEstimator)):
        raise ValueError(
            f"estimator= is {estimator!r:.80}, expected a class of the family, which is made here "
            f"with the options that follow: {call}estimator=fogzo.FogzoEstimator, num_samples=2)"
        )


def check_noise(call: str, kappa: float | None, start: float, options: Mapping[str, Any]) -> None:
    """Refuse noise that is given twice.

    Args:
        call: How the refinement is asked for, up to its first option.
        kappa: Noise at the end of the run.
        start: Fraction of the run that is plain STE before.
        options: Of the estimator.

    Raises:
        ValueError: If there is a schedule among the options too.
    """
    if "noise_share" in options and (kappa is not None or start):
        raise ValueError(
            f"give either kappa and start or a noise_share of your own: {call}kappa=0.01)"
        )
