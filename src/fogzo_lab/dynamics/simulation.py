"""The run itself: a real quantized layer trained by SGD, with an estimator of your own if asked."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

import fogzo
from fogzo.estimators.schedules import LinearNoiseShare
from fogzo.methods import project_
from fogzo.probing.directions import mix_seed
from fogzo.quantizers.checks import require_count, require_seed
from fogzo_lab.dynamics.curve import Curve, Density
from fogzo_lab.dynamics.setting import Regression, check_times


class Refiner(Protocol):
    """What an estimator must be able to do here."""

    def refine_grads_(self, closure: Callable[[], Tensor]) -> object:
        """Rewrite the gradients."""


MakeEstimator = Callable[[Sequence[fogzo.QuantizedWeight], int], Refiner | None]
"""From the weights and the number of steps to an estimator, or None for the plain gradient."""


def simulate(
    setting: Regression,
    times: Sequence[float],
    *,
    weights: int,
    seed: int,
    estimator: MakeEstimator | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> Curve:
    """Train once.

    Args:
        setting: What is trained.
        times: tau at which to look, ascending from 0, to the nearest step.
        weights: d.
        seed: Of the start, the data and the estimator.
        estimator: Makes an estimator in place of the setting's own: of a new one, whose curve is
            to be compared with one that is known.
        data: The start and all batches, `batches` of these arguments, for runs on the same data.

    Returns:
        The curve, and as its agreement the mean since the time before of what was measured.

    Raises:
        ValueError: If times are no ascending numbers from 0 or end before the first step, there are
            no weights, the seed is no integer, the data are of another number of weights or end
            early, or the estimator is not made by a function of the two.
    """
    checked = check_times(times)
    weights = require_count("weights", weights, "weights=1000")
    seed = require_seed(seed)
    stops = [round(time * weights) for time in checked]
    if stops[-1] < 1:
        raise ValueError(
            f"times end at {checked[-1]:g}, in steps per weight, before the first step of "
            f"{weights} weights: times=[0, 10, 20]"
        )
    if data is None:
        source = batches(setting, weights, stops[-1], seed)
    else:
        source = _given(data, weights, stops[-1])
    start, teacher = next(source)
    points, agreements = [], [math.nan]
    measured: list[float] = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", RuntimeWarning)  # of so few weights now and then none flips
        layer = _layer(setting, start)
        # What levels are drawn by; the stream is given back at the end. Mixed, as a generator takes
        # the lower 32 bits of a seed alone, and the data have those already.
        torch.set_rng_state(torch.Generator().manual_seed(mix_seed(seed, 1)).get_state())
        records = fogzo.quantized_weights(layer)
        refiner = _made(estimator or _own(setting, seed), records, stops[-1])
        # Inputs have covariance I / d, so a rate in units of d does not depend on d.
        optimizer = torch.optim.SGD(layer.parameters(), lr=setting.learning_rate)
        points.append(_look(setting, layer, teacher))
        for before, stop in pairwise(stops):
            for _ in range(before, stop):
                x, y = next(source)
                optimizer.zero_grad()
                _loss(layer, x, y).backward()
                if refiner is not None:
                    stats = refiner.refine_grads_(partial(_loss, layer, x, y))
                    found = getattr(stats, "agreement", None)
                    measured += [] if found is None else [found]
                optimizer.step()
                if setting.projected:
                    project_(records)
            points.append(_look(setting, layer, teacher))
            agreements.append(float(np.mean(measured)) if measured else math.nan)
            measured = []
    risk, trained, outside = np.array(points).T
    density = _histogram(layer.weight.detach())
    return Curve(checked, risk, trained, outside, np.array(agreements), density)


def _given(
    data: Iterable[tuple[Tensor, Tensor]], weights: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Data of somebody's own: the start, and a batch for each step."""
    way_out = "data=list(batches(setting, weights, steps, seed)), with the weights of this run"
    taken = 0
    for pair in data:
        taken += 1
        if pair[0].shape[-1] != weights:
            raise ValueError(
                f"data are of {pair[0].shape[-1]} weights, and the run is of {weights}: {way_out}"
            )
        yield pair
    raise ValueError(
        f"data end after {taken} of the {steps + 1} pairs of a run, its start and {steps} batches: "
        f"{way_out} and as many steps"
    )


def _made(
    make: MakeEstimator, records: Sequence[fogzo.QuantizedWeight], steps: int
) -> Refiner | None:
    """The estimator of a run."""
    example = "estimator=lambda weights, steps: fogzo.FogzoEstimator(weights)"
    is_member = isinstance(make, type) and issubclass(make, fogzo.GradientEstimator)
    if is_member or not callable(make):
        raise ValueError(
            f"estimator= is {make!r:.80}, expected a function of the weights and the number of "
            f"steps: {example}"
        )
    refiner = make(records, steps)
    if not (refiner is None or hasattr(refiner, "refine_grads_")):
        raise ValueError(f"estimator= made {refiner!r:.80}, which has no refine_grads_: {example}")
    return refiner


def _loss(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (layer(x) - y).square().mean()


def _histogram(weight: Tensor, width: float = 0.1) -> Density:
    edges = width * (np.arange(-60, 61) - 0.5)
    counts, _ = np.histogram(weight.cpu().numpy(), edges)
    return Density((edges[1:] + edges[:-1]) / 2, counts / (weight.numel() * width))


def batches(
    setting: Regression, weights: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Where the weights start and the teacher's, then inputs and targets of each step.

    They depend on the seed, d, the batch size, the label noise and the teacher, and so are the same
    for all ways to train.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, weights, generator=generator)
    teacher = torch.full((weights,), 1.0)
    if setting.teacher == "normal":
        teacher = torch.randn(weights, generator=generator)
    else:
        teacher *= setting.teacher
    yield start, teacher
    for _ in range(steps):
        x = torch.randn(setting.batch_size, weights, generator=generator).mul_(weights**-0.5)
        noise = torch.randn(setting.batch_size, 1, generator=generator)
        yield x, (x @ teacher)[:, None] + setting.label_noise * noise


def _layer(setting: Regression, start: Tensor) -> nn.Linear:
    layer = nn.Linear(start.shape[1], 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(start)
    mask = "identity" if setting.masked else "identity_unmasked"
    quantizer = replace(
        fogzo.fixed(setting.bits, step_size=setting.spacing, levels="half"),
        surrogate="adjacent" if setting.rounding == "adjacent" else mask,
        stochastic=setting.rounding != "nearest",
    )
    inputs = None
    if setting.input_bits is not None:  # which are a sqrt(d)-th of standard normals
        step = setting.input_spacing / start.shape[1] ** 0.5
        inputs = fogzo.fixed(
            setting.input_bits, step_size=step, levels="half", surrogate="identity"
        )
    return fogzo.quantize_(layer, quantizer, lambda module, name: True, activations=inputs)


def _own(setting: Regression, seed: int) -> MakeEstimator:
    """The setting's own estimator."""

    def make(records: Sequence[fogzo.QuantizedWeight], steps: int) -> Refiner | None:
        if setting.estimator == "ste":
            return None
        share: float | LinearNoiseShare = 0.0
        if setting.kappa:
            share = fogzo.linear_noise_share(total_steps=steps, kappa=setting.kappa)
        if setting.estimator == "placebo":
            return fogzo.PlaceboEstimator(
                records, noise_share=share, noise_shape="isotropic", seed=seed
            )
        return fogzo.FogzoEstimator(
            records, noise_share=share, noise_shape="isotropic", agreement="measured", seed=seed
        )

    return make


@torch.no_grad()
def _look(setting: Regression, layer: nn.Linear, teacher: Tensor) -> tuple[float, float, float]:
    """Risk at the nearest levels, as trained, and the share outside."""
    k1, k2 = setting.input_moments
    w, step = layer.weight[0].double(), setting.spacing
    target = teacher.double()

    def risk(level: Tensor) -> Tensor:
        return target.square() - 2 * k1 * target * level + k2 * level.square()

    layer.eval()
    nearest = trained = float(
        risk(cast(fogzo.QuantizedLayer, layer).quantized_weight()[0].double()).mean()
    )
    layer.train()
    if setting.rounding != "nearest":
        x = w.clamp(-setting.omega, setting.omega) / step - 0.5
        below = x.floor().clamp(max=setting.grid.high_code - 1)
        mixed = torch.lerp(risk(step * (below + 0.5)), risk(step * (below + 1.5)), x - below)
        trained = float(mixed.mean())
    outside = float((w.abs() > setting.omega).double().mean())
    return nearest, trained, outside
