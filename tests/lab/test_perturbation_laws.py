"""Laws to perturb with that no surrogate need follow from, and laws brought to another radius."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Generator

from fogzo import quantized_weights
from fogzo.quantizers.smoothing import LAWS, Rademacher, Scaled, Triangular, with_radius
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.models import Shapes, build_model
from fogzo_lab.training.state import build_estimator

F64 = torch.float64


def test_rademacher_noise_is_a_fair_coin():
    law = Rademacher()
    u = law.sample_(torch.empty(40_000), Generator().manual_seed(2))
    assert set(u.tolist()) == {-1.0, 1.0}
    assert abs(u.mean().item()) < 5 / math.sqrt(len(u))
    assert (law.radius, law.kurtosis) == (1.0, 1.0)
    with pytest.raises(ValueError, match="keep the slope of another law"):
        law.pdf(u)


@pytest.mark.parametrize("name", LAWS)
def test_every_law_can_be_brought_to_a_radius(name):
    law = with_radius(LAWS[name], 0.37)
    assert law.radius == pytest.approx(0.37)
    assert law.kurtosis == LAWS[name].kurtosis
    u = law.sample_(torch.empty(40_000, dtype=F64), Generator().manual_seed(4))
    deviation = math.sqrt(max(law.kurtosis - 1, 0) / len(u))
    assert u.square().mean().item() == pytest.approx(1, abs=5 * deviation + 1e-12)


def test_a_stretched_law_is_the_law_of_the_stretched_noise():
    law, wide = Triangular(), Triangular(2.5)
    z = torch.linspace(-3, 3, 61, dtype=F64)
    stretched = Scaled(law, 2.5)
    assert torch.allclose(stretched.pdf(z), wide.pdf(z))
    assert stretched.radius == pytest.approx(wide.radius)


def estimator(**changes):
    config = replace(RECIPES["digits-mlp"](), **changes)
    model = build_model(config, Shapes(10, 1, 8))
    return build_estimator(config, model), quantized_weights(model)


def test_the_recipe_changes_the_law_and_radius_of_fogzo_and_nothing_else():
    plain, records = estimator()
    assert [w.surrogate for w in plain.weights] == [w.surrogate for w in records]
    other, records = estimator(perturbation="normal", radius=2.0)
    for weight, record in zip(other.weights, records, strict=True):
        assert weight.surrogate.radius == pytest.approx(2 * record.surrogate.radius)
        assert weight.surrogate.perturbation.kurtosis == 3
        assert weight.surrogate.law == record.surrogate.law
        assert weight.surrogate.range_slack == record.surrogate.range_slack
    wider, _ = estimator(radius=2.0)
    assert wider.weights[0].surrogate.perturbation.kurtosis == pytest.approx(9 / 5)
    assert wider.weights[0].surrogate.radius == other.weights[0].surrogate.radius


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf])
def test_a_radius_that_cannot_be_is_refused(radius):
    with pytest.raises(ValueError, match=r"--radius 1\.0"):
        replace(RECIPES["digits-mlp"](), radius=radius)
