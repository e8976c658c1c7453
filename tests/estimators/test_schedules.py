"""How much noise, and when: shares, kappas, schedules and the steps that they leave out."""

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

import fogzo
from toolbox import batch, quantized_net

X, Y = batch()


class Training:
    """A network, trained with an estimator whose options these are."""

    def __init__(self, cls=fogzo.FogzoEstimator, **options):
        self.model = quantized_net("lsq", dropout=0.0)
        self.weights = fogzo.quantized_weights(self.model)
        self.estimator = cls(self.weights, **options)

    def loss_of(self):
        return mse_loss(self.model(X), Y)

    def step(self, closure=None):
        """The statistics of a step, and whether it left the gradients alone."""
        self.model.zero_grad()
        self.loss_of().backward()
        given = [w.param.grad.clone() for w in self.weights]
        stats = self.estimator.refine_grads_(closure or self.loss_of)
        same = [torch.equal(w.param.grad, g) for w, g in zip(self.weights, given, strict=True)]
        return stats, all(same)


@pytest.mark.parametrize("n", [1, 4])
def test_the_default_share_gives_noise_a_thousandth_of_the_signals_power(n):
    training = Training(num_samples=n)
    stats, _ = training.step()
    d = training.estimator.num_weights
    assert d == 128
    assert stats.noise_share == pytest.approx(1e-3 * n / (d + 1e-3 * n), rel=1e-12)
    assert stats.kappa == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize(
    "numbers",
    [{"kappa": np.float32(0.5)}, {"num_weights": np.int64(9)}, {"num_samples": np.int64(1)}],
    ids=str,
)
def test_numbers_of_numpys_make_a_plain_share(numbers):
    schedule = fogzo.linear_noise_share(**{"total_steps": 2, "num_weights": 9, **numbers})
    assert type(schedule(1)) is float


@pytest.mark.parametrize("noise_share", [None, fogzo.linear_noise_share(total_steps=1, kappa=0.01)])
def test_layers_that_are_unfrozen_later_count_from_then_on(noise_share):
    early, late = (Training(noise_share=noise_share) for _ in range(2))
    late.model.first.requires_grad_(False)
    late.estimator = fogzo.FogzoEstimator(late.weights, noise_share=noise_share)
    frozen = late.estimator.num_weights
    late.model.first.requires_grad_(True)
    for training in (early, late):
        training.estimator.step = 1
    (expected, _), (stats, _) = early.step(), late.step()
    assert frozen < late.estimator.num_weights == early.estimator.num_weights
    assert (stats.kappa, stats.noise_share) == (expected.kappa, expected.noise_share)
    assert stats.kappa == pytest.approx(1e-3 if noise_share is None else 0.01, rel=1e-9)


@pytest.mark.parametrize(("num_weights", "kappa"), [(7940, 1.0), (5_000_000, None)])
@pytest.mark.parametrize("n", [1, 10])
def test_the_schedule_ends_at_the_share_of_its_kappa(n, num_weights, kappa):
    schedule = fogzo.linear_noise_share(
        kappa=kappa, num_weights=num_weights, total_steps=10, num_samples=n
    )
    kappa = 1e-3 if kappa is None else kappa
    q = schedule(10)
    assert q == pytest.approx(kappa * n / (num_weights + kappa * n), rel=1e-12)
    assert q * num_weights / (n * (1 - q)) == pytest.approx(kappa, rel=1e-12)


def test_the_schedule_rises_linearly_from_no_noise_at_all():
    share = fogzo.linear_noise_share(num_weights=900, total_steps=8, kappa=100.0)
    assert share(0) == 0.0
    assert [share(t) / share(8) for t in range(9)] == pytest.approx([t / 8 for t in range(9)])
    assert share(8) == pytest.approx(0.1)
    assert share(1000) == share(8)


def test_before_the_start_the_gradient_is_left_alone_and_then_beta_is_one():
    schedule = fogzo.linear_noise_share(total_steps=10, start=0.3, kappa=1.0)
    training = Training(noise_share=schedule)
    for step in range(3):
        stats, same = training.step(lambda: pytest.fail("a loss was measured too early"))
        assert (stats.step, stats.noise_share, stats.kappa) == (step, None, None)
        assert stats.probe_losses == ()
        assert stats.fallback is None
        assert same
    stats, _ = training.step()
    assert (stats.step, stats.noise_share, stats.kappa) == (3, 0.0, 0.0)
    assert stats.agreement is not None
    stats, _ = training.step()
    assert stats.noise_share == pytest.approx(1 / 129 / 7)


def test_probing_every_third_step_leaves_the_others_alone():
    training = Training(noise_share=fogzo.every(3, 0.1))
    steps = [training.step() for _ in range(7)]
    assert [stats.noise_share for stats, _ in steps] == [0.1, None, None, 0.1, None, None, 0.1]
    assert [same for _, same in steps] == [False, True, True, False, True, True, False]
    with pytest.raises(ValueError, match="interval=4"):
        fogzo.every(0, 0.1)


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("cls", [fogzo.FogzoEstimator, fogzo.PlaceboEstimator])
def test_the_kappa_that_was_asked_for_is_the_kappa_that_is_used(cls, n):
    schedule = fogzo.linear_noise_share(total_steps=2, kappa=1.0)
    for noise_share in (schedule, fogzo.every(2, schedule)):
        training = Training(cls, num_samples=n, noise_share=noise_share)
        stats = [training.step()[0] for _ in range(3)]
        assert stats[-1].kappa == pytest.approx(1.0)
    for wrong in ({"num_weights": 129}, {"num_samples": n + 1}):
        schedule = fogzo.linear_noise_share(total_steps=2, kappa=1.0, **wrong)
        with pytest.raises(ValueError, match="the estimator fills it in"):
            Training(cls, num_samples=n, noise_share=schedule)


def test_a_schedule_that_knows_no_weights_says_how_to_read_it():
    schedule = fogzo.linear_noise_share(total_steps=10, kappa=1.0)
    with pytest.raises(ValueError, match=r"noise_share=schedule.*num_weights="):
        schedule(3)


def test_weights_without_a_single_number_are_refused_when_the_estimator_is_made():
    empty = [("w", torch.nn.Parameter(torch.zeros(0, 4)), 1.0)]
    with pytest.raises(ValueError, match="num_weights must be a positive integer, got 0"):
        fogzo.FogzoEstimator(empty)
