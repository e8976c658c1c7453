"""A closure that is not the loss of the backward pass is found out, early or late."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo

pytestmark = pytest.mark.filterwarnings("ignore:(no weight rounds|the probes):RuntimeWarning")


def network(*extra, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), *extra, nn.Linear(64, 64), nn.Tanh())
        return fogzo.quantize_(model.append(nn.Linear(64, 10)), fogzo.lsq(2))


def batches(seed=0, size=512):
    stream = torch.Generator().manual_seed(seed)
    while True:
        yield (
            torch.randn(size, 16, generator=stream),
            torch.randint(10, (size,), generator=stream),
        )


def test_another_batch_is_found_out_at_initialisation_where_all_losses_look_alike():
    refused = 0
    for seed in range(10):
        model, data = network(seed=seed), batches(seed)
        (x, y), (other_x, other_y) = next(data), next(data)
        loss = cross_entropy(model(x), y)
        other = cross_entropy(model(other_x), other_y)
        assert abs(loss - other) < 0.02 * loss
        loss.backward()
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
        before = [p.grad.clone() for p in model.parameters()]
        try:
            estimator.refine_grads_(
                lambda m=model, x=other_x, y=other_y: cross_entropy(m(x), y), expected_loss=loss
            )
        except ValueError as error:
            assert "rebound to the next batch" in str(error)
            refused += 1
            for p, grad in zip(model.parameters(), before, strict=True):
                assert torch.equal(p.grad, grad)
    assert refused == 10


@pytest.mark.parametrize("first_wrong", [3, 12])
def test_a_closure_that_goes_wrong_later_is_found_out_by_the_next_audit(first_wrong):
    model, data = network(), batches()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    found = None
    for step in range(1, 101):
        x, y = next(data)
        seen = next(data) if step >= first_wrong else (x, y)
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        try:
            estimator.refine_grads_(
                lambda s=seen: cross_entropy(model(s[0]), s[1]), expected_loss=loss
            )
        except ValueError:
            found = step
            break
    assert found is not None
    assert found <= (10 if first_wrong <= 10 else 100)


def test_a_closure_far_from_the_loss_is_audited_at_once():
    model, data = network(), batches()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    x, y = next(data)
    for _ in range(2):
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss=loss)
    model.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    with pytest.raises(ValueError, match="a sum against a mean"):  # in step 3, between audits
        estimator.refine_grads_(
            lambda: cross_entropy(model(x), y, reduction="sum"), expected_loss=loss
        )


def test_a_right_closure_is_never_refused_and_audited_seldom():
    model, data = network(), batches(size=64)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return cross_entropy(model(x), y)

    for _ in range(100):
        x, y = next(data)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        estimator.refine_grads_(closure, expected_loss=loss)
        optimizer.step()
    assert calls == 2 * 100 + 3  # steps 1, 10 and 100


def test_dropout_without_a_recording_is_found_out():
    model, data = network(nn.Dropout(0.1)), batches()
    x, y = next(data)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    loss = cross_entropy(model(x), y)
    loss.backward()
    with pytest.raises(ValueError, match=r"estimator\.record_rng\(\)"):
        estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss=loss)


class Moving(nn.Module):
    """Statistics that every forward pass in train mode moves, and uses."""

    def __init__(self):
        super().__init__()
        self.register_buffer("size", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.size.lerp_(x.detach().abs().mean() * 1.02, 0.01)
        return x / self.size


@pytest.mark.parametrize("kind", ["buffers that move", "bfloat16 inside", "numbers that scatter"])
def test_what_cannot_repeat_a_loss_to_the_last_digit_is_given_room(kind):
    model, data = network(*([Moving()] if kind == "buffers that move" else [])), batches()
    x, y = next(data)
    noise = torch.Generator().manual_seed(0)

    def loss_of():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16 inside"):
            logits = model(x)
        loss = cross_entropy(logits.float(), y)
        if kind == "numbers that scatter":  # atomics of an accelerator
            return loss * (1 + 1e-4 * torch.randn((), generator=noise))
        # As another graph of a compiler would compute it.
        return loss * (1 + 1e-4 * (not torch.is_grad_enabled()) * (kind == "bfloat16 inside"))

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    for _ in range(3):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        estimator.refine_grads_(loss_of, expected_loss=loss)


@pytest.mark.parametrize("expected", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_an_expected_loss_that_is_no_number_passes_no_audit(expected):
    model, data = network(), batches()
    x, y = next(data)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"expected_loss is (nan|inf)"):
        estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss=expected)
    with pytest.raises(ValueError, match="expected_loss must be"):
        estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss="2.3")


@pytest.mark.parametrize("mistake", ["a sum", "noise of its own"])
def test_an_agreement_that_no_rounding_explains_is_doubted_once(mistake):
    own = torch.Generator().manual_seed(0)  # which nobody replays
    model, data = network(), batches(size=64)
    x, y = next(data)

    def closure():
        if mistake == "a sum":
            return cross_entropy(model(x), y, reduction="sum")
        return cross_entropy(model(x), y) + 0.5 * torch.randn((), generator=own)

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            estimator.refine_grads_(closure)
    (told,) = [str(w.message) for w in caught]
    assert "record_rng" in told
    assert "a sum against a mean" in told


# One refinement per backward pass


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("cls", [fogzo.FogzoEstimator, fogzo.PlaceboEstimator])
def test_gradients_are_refined_once(cls, same):
    model, data = network(), batches()
    x, y = next(data)
    weights = fogzo.quantized_weights(model)
    first = cls(weights)
    second = first if same else fogzo.FogzoEstimator(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # and a second step is fine
        optimizer.zero_grad(set_to_none=False)
        cross_entropy(model(x), y).backward()
        first.refine_grads_(lambda: cross_entropy(model(x), y))
        grads = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=r"refined already.*once per step"):
            second.refine_grads_(lambda: cross_entropy(model(x), y))
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert torch.equal(p.grad, grad)
        optimizer.step()


def test_parameters_that_were_replaced_are_noticed():
    model, data = network(), batches()
    x, y = next(data)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    fresh = copy.deepcopy(model[2].weight)
    model[2]._parameters["weight"] = fresh
    cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"'2\.weight' is no parameter of its model any more"):
        estimator.refine_grads_(lambda: cross_entropy(model(x), y))


# Kappa is said once


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("cls", [fogzo.FogzoEstimator, fogzo.PlaceboEstimator])
def test_the_kappa_that_was_asked_for_is_the_kappa_that_is_used(cls, n):
    model, data = network(), batches()
    x, y = next(data)
    weights = fogzo.quantized_weights(model)
    schedule = fogzo.linear_noise_share(total_steps=2, kappa=1.0)
    for noise_share in (schedule, fogzo.every(2, schedule)):
        estimator = cls(weights, num_samples=n, noise_share=noise_share)
        for _ in range(3):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            stats = estimator.refine_grads_(lambda: cross_entropy(model(x), y))
        assert stats.kappa == pytest.approx(1.0)
    d = sum(w.param.numel() for w in weights)
    for wrong in ({"num_weights": d + 1}, {"num_samples": n + 1}):
        schedule = fogzo.linear_noise_share(total_steps=2, kappa=1.0, **wrong)
        with pytest.raises(ValueError, match="the estimator fills it in"):
            cls(weights, num_samples=n, noise_share=schedule)


def test_a_schedule_that_knows_no_weights_says_how_to_read_it():
    schedule = fogzo.linear_noise_share(total_steps=10, kappa=1.0)
    with pytest.raises(ValueError, match=r"noise_share=schedule.*num_weights="):
        schedule(3)


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"lean": "no"},
        {"one_sided": 1},
        {"track_flips": None},
        {"paired": "yes"},
        {"agreement": "exact"},
        {"agreement": True},
        {"noise_shape": ["isotropic"]},
        {"coordinates": 3},
        {"seed": None},
        {"seed": 1.5},
        {"seed": True},
        {"seed": "0"},
        {"num_samples": 2.0},
        {"num_samples": None},
        {"noise_share": "0.1"},
        {"noise_share": True},
        {"noise_share": float("nan")},
        {"noise_share": [0.1]},
        {"model": "model"},
        {"model": nn.Linear},
        {"keep_noise": "yes"},
        {"overhead": "0.1"},
        {"overhead": True},
        {"probes_at_once": 1.5},
    ],
    ids=str,
)
def test_options_of_another_type_are_refused_by_the_constructor(options):
    weights = fogzo.quantized_weights(network())
    with pytest.raises(ValueError, match=next(iter(options))):
        fogzo.FogzoEstimator(weights, **options)


@pytest.mark.parametrize("step", [0.0, -0.1, float("nan"), float("inf"), "0.1", None, object()])
def test_step_sizes_that_are_none_are_refused(step):
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="step size of 'w'"):
        fogzo.FogzoEstimator([("w", layer.weight, step)])


@pytest.mark.parametrize("weights", [None, 3, nn.Linear(2, 2), "weights", [1], [("w", 0.1)]])
def test_what_is_no_list_of_weights_is_refused(weights):
    with pytest.raises(ValueError, match="quantized_weights"):
        fogzo.FogzoEstimator(weights)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), -1, 2**70])
def test_any_integer_is_a_seed(seed):
    model, data = network(), batches()
    x, y = next(data)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), seed=seed)
    cross_entropy(model(x), y).backward()
    estimator.refine_grads_(lambda: cross_entropy(model(x), y))
    assert type(estimator.state_dict()["seed"]) is int


@pytest.mark.parametrize("preset", [fogzo.fixed, fogzo.lsq, fogzo.quest])
@pytest.mark.parametrize(
    "cls",
    [
        fogzo.FogzoEstimator,
        fogzo.PlaceboEstimator,
        fogzo.ControlVariateEstimator,
        fogzo.SpsaEstimator,
    ],
)
def test_an_estimator_can_be_sent_to_another_process_with_its_model(cls, preset):
    model, data = network(), batches()
    fogzo.dequantize_(model)
    fogzo.quantize_(model, preset(2))
    x, y = next(data)
    estimator = cls(fogzo.quantized_weights(model), seed=4)
    copies = pickle.loads(pickle.dumps((model, estimator)))
    grads = []
    for m, e in ((model, estimator), copies):
        cross_entropy(m(x), y).backward()
        e.refine_grads_(lambda m=m: cross_entropy(m(x), y))
        grads.append([p.grad for p in m.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_loss_with_derivatives_in_it_is_told_to_switch_gradients_on():
    model, data = network(), batches(size=16)
    x, y = next(data)

    def penalised(inputs):
        loss = cross_entropy(model(inputs), y)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return loss + slope.square().sum()

    def closure():
        with torch.enable_grad():
            return penalised(x.clone().requires_grad_())

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    loss = penalised(x.clone().requires_grad_())
    loss.backward()
    with pytest.raises(ValueError, match=r"torch\.enable_grad\(\)"):
        estimator.refine_grads_(lambda: penalised(x.clone().requires_grad_()))
    assert estimator.refine_grads_(closure, expected_loss=loss).fallback is None
