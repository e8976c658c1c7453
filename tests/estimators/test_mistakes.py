"""Every mistake is a ValueError that shows the corrected call, and changes nothing."""

import copy
import math
import random
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo


class Setup:
    """A quantized network after its backward pass, with an estimator that has run a step."""

    def __init__(self, dropout=0.0, backward=True, **options):
        stream = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)
        )
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=stream))
        fogzo.quantize_(self.model, fogzo.fixed(2), filter_fn=lambda module, name: True)
        self.x = torch.randn(16, 6, generator=stream)
        self.y = torch.randn(16, 3, generator=stream)
        self.weights = fogzo.quantized_weights(self.model)
        self.estimator = fogzo.FogzoEstimator(self.weights, **options)
        self.loss = self.loss_of()
        if backward:
            self.loss.backward()
        self.before = self.state()

    def loss_of(self):
        return mse_loss(self.model(self.x), self.y)

    def state(self):
        """All that a refused call must leave as it is, as bytes."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        numpy = np.random.get_state()
        return (
            [t.detach().numpy().tobytes() for t in tensors],
            [p.grad is None for p in self.model.parameters()],
            [m.training for m in self.model.modules()],
            torch.get_rng_state().numpy().tobytes(),
            random.getstate(),
            (numpy[1].tobytes(), numpy[2:]),
            torch.is_grad_enabled(),
        )

    def assert_untouched(self, step=0):
        assert self.state() == self.before
        assert self.estimator.step == step


def refused(shows):
    """Expect a ValueError whose text contains ``shows``, the corrected call."""
    return pytest.raises(ValueError, match=re.escape(shows))


# The estimator's arguments


@pytest.mark.parametrize("share", [-0.1, 1.0, 1, 2.5, math.nan, math.inf])
def test_a_noise_share_outside_its_range_is_refused(share):
    setup = Setup()
    with refused("leave it out for a kappa of 0.001, or noise_share=fogzo.linear_noise_share("):
        fogzo.FogzoEstimator(setup.weights, noise_share=share)
    setup.assert_untouched()


@pytest.mark.parametrize("weight", [1.0, -0.1, math.nan, "much"])
def test_the_weight_of_a_control_variate_is_refused_by_its_own_name(weight):
    setup = Setup()
    with refused("weight is the fraction of STE's bias that is removed, in [0, 1), got "):
        fogzo.ControlVariateEstimator(setup.weights, weight=weight)
    with refused("leave noise_share out, and weight, which has a default"):
        fogzo.ControlVariateEstimator(setup.weights, noise_share=0.1)
    setup.assert_untouched()


@pytest.mark.parametrize("share", [-1e-9, 1.0, math.nan])
def test_a_noise_share_function_is_checked_when_it_is_called(share):
    setup = Setup(noise_share=lambda step: share)
    with refused("noise_share=fogzo.linear_noise_share("):
        setup.estimator.refine_grads_(setup.loss_of)
    setup.assert_untouched()


def test_pure_noise_is_sent_to_the_estimator_made_for_it():
    setup = Setup()
    with refused("fogzo.SpsaEstimator"):
        fogzo.FogzoEstimator(setup.weights, noise_share=1.0)
    with refused("fogzo.FogzoEstimator(weights, noise_share=...)"):
        fogzo.SpsaEstimator(setup.weights, noise_share=0.5)


@pytest.mark.parametrize("kappa", [-1e-3, math.inf, math.nan, True, "1e-3"])
def test_a_kappa_that_is_no_power_is_refused(kappa):
    with refused("kappa=1e-3"):
        fogzo.linear_noise_share(num_weights=1000, total_steps=10, kappa=kappa)


@pytest.mark.parametrize("total_steps", [0, -5, 2.5])
def test_a_run_without_steps_is_refused(total_steps):
    with refused("total_steps=1000"):
        fogzo.linear_noise_share(num_weights=1000, total_steps=total_steps)


@pytest.mark.parametrize("start", [-0.1, 1.0, 70, math.nan])
def test_a_start_that_is_no_fraction_of_the_run_is_refused(start):
    with refused("start=0.7 for 70% STE"):
        fogzo.linear_noise_share(num_weights=1000, total_steps=10, start=start)


@pytest.mark.parametrize("num_weights", [0, -1])
def test_a_network_without_weights_has_no_schedule(num_weights):
    with refused("num_weights=sum(w.param.numel() for w in weights)"):
        fogzo.linear_noise_share(num_weights=num_weights, total_steps=10)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize(
    "cls", [fogzo.FogzoEstimator, fogzo.SpsaEstimator, fogzo.ControlVariateEstimator]
)
def test_less_than_one_sample_is_refused(cls, count):
    setup = Setup()
    with refused(f"{cls.__name__}(weights, num_samples=1)"):
        cls(setup.weights, num_samples=count)
    setup.assert_untouched()


@pytest.mark.parametrize(
    ("option", "shows"),
    [
        ({"evaluate": "together"}, 'evaluate="in_place"'),
        ({"agreement": "exact"}, 'agreement="shrunk"'),
        ({"noise_shape": "round"}, 'noise_shape="tensor_rms"'),
    ],
)
def test_an_unknown_option_is_refused_with_those_that_exist(option, shows):
    setup = Setup()
    with refused(shows):
        fogzo.FogzoEstimator(setup.weights, **option)


def test_the_noise_shape_that_is_proposed_is_the_estimators_own():
    setup = Setup()
    with refused('noise_shape="isotropic"'):
        fogzo.SpsaEstimator(setup.weights, noise_shape="round")


@pytest.mark.parametrize(
    "options",
    [
        {"one_sided": 1},
        {"agreement": "exact"},
        {"agreement": True},
        {"noise_shape": ["isotropic"]},
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
    ],
    ids=str,
)
def test_options_of_another_type_are_refused_by_the_constructor(options):
    weights = Setup().weights
    with pytest.raises(ValueError, match=next(iter(options))):
        fogzo.FogzoEstimator(weights, **options)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3), -1, 2**70])
def test_any_integer_is_a_seed(seed):
    setup = Setup(seed=seed)
    setup.estimator.refine_grads_(setup.loss_of)
    assert type(setup.estimator.state_dict()["seed"]) is int


# The weights


@pytest.mark.parametrize("step", [0.0, -0.1, float("nan"), float("inf"), "0.1", None, object()])
def test_step_sizes_that_are_none_are_refused(step):
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="step size of 'w'"):
        fogzo.FogzoEstimator([("w", layer.weight, step)])


@pytest.mark.parametrize("weights", [None, 3, nn.Linear(2, 2), "weights", [1], [("w", 0.1)]])
def test_what_is_no_list_of_weights_is_refused(weights):
    with pytest.raises(ValueError, match="quantized_weights"):
        fogzo.FogzoEstimator(weights)


def test_an_empty_list_is_refused():
    with refused("FogzoEstimator(fogzo.quantized_weights(model), ...)"):
        fogzo.FogzoEstimator([])
    with refused("fogzo.quantize_(model, fogzo.lsq(bits=2))"):
        fogzo.FogzoEstimator(fogzo.quantized_weights(nn.Linear(2, 2)))


def test_a_parameter_listed_twice_is_refused():
    setup = Setup()
    weight = setup.weights[0].param
    with refused("list a tied weight once"):
        fogzo.FogzoEstimator([*setup.weights, ("again", weight, 0.5)])
    with refused("'b' and 'a' are the same parameter"):
        fogzo.FogzoEstimator([("a", weight, 0.5), ("b", weight, 0.5)])


def test_two_parameters_in_one_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.data = model[0].weight.data  # how weights were tied once
    fogzo.quantize_(model, fogzo.lsq(2))
    with refused("tie the parameter itself, 1.weight = 0.weight, before fogzo.quantize_"):
        fogzo.FogzoEstimator(fogzo.quantized_weights(model))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (4, 2, 2), (2, 4, 3, 1)])
def test_a_step_size_that_does_not_fit_its_weight_is_refused(shape):
    weight = nn.Parameter(torch.ones(4, 2, 3))
    with refused("step.reshape(-1, 1, 1) for one per channel"):
        fogzo.FogzoEstimator([("w", weight, torch.ones(shape))])
    with refused("step.reshape(-1, 1, 1)"):
        fogzo.FogzoEstimator([fogzo.QuantizedWeight("w", weight, lambda: torch.ones(shape))])


@pytest.mark.parametrize("held", [torch.ones(4, 1), torch.ones(3, 1).bool(), [True], True])
def test_held_entries_that_are_no_mask_of_the_weight_are_refused(held):
    weight = nn.Parameter(torch.ones(4, 2))
    record = fogzo.QuantizedWeight("w", weight, lambda: torch.tensor(0.1), held=held)
    with refused("to the weight's (4, 2), got"):
        fogzo.FogzoEstimator([record])


def test_a_step_size_larger_than_its_weight_is_refused():
    with refused("give a scalar"):
        fogzo.FogzoEstimator([("w", nn.Parameter(torch.ones(1, 2)), torch.ones(4, 1))])


def test_a_step_size_that_is_no_tensor_is_refused():
    weight = nn.Parameter(torch.ones(2))
    with refused("return a tensor"):
        fogzo.FogzoEstimator([fogzo.QuantizedWeight("w", weight, lambda: 0.5)])


def test_integer_weights_are_refused():
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with refused("quantize the float model"):
        fogzo.FogzoEstimator([("w", weight, 0.5)])


def test_weights_without_memory_are_refused():
    weight = nn.Linear(2, 2, device="meta").weight
    with refused('model.to_empty(device="cpu")'):
        fogzo.FogzoEstimator([("w", weight, 0.5)])


@pytest.mark.parametrize("weight", [torch.ones(2), "conv1.weight", None])
def test_what_is_no_parameter_is_refused(weight):
    with refused("must be an nn.Parameter"):
        fogzo.FogzoEstimator([("w", weight, 0.5)])


@pytest.mark.parametrize("entry", [nn.Linear(2, 2).weight, ("w", None), "w"])
def test_what_is_no_record_is_refused(entry):
    with refused('triples ("name", parameter, step_size)'):
        fogzo.FogzoEstimator([entry])


# The call


def test_refining_before_backward_is_refused():
    setup = Setup(backward=False)
    with refused("loss.backward(); estimator.refine_grads_(closure); optimizer.step()"):
        setup.estimator.refine_grads_(setup.loss_of)
    setup.assert_untouched()


def test_refining_after_zero_grad_is_refused():
    setup = Setup()
    setup.model.zero_grad()
    setup.before = setup.state()
    with refused("before zero_grad"):
        setup.estimator.refine_grads_(setup.loss_of)
    setup.assert_untouched()


def test_the_weights_of_a_deep_copy_are_refused():
    setup = Setup()
    trained = copy.deepcopy(setup.model)
    trained.zero_grad()
    setup.model.zero_grad()
    mse_loss(trained(setup.x), setup.y).backward()
    setup.before = setup.state()
    with refused("a deep copy made after quantized_weights(model)"):
        setup.estimator.refine_grads_(lambda: mse_loss(trained(setup.x), setup.y))
    setup.assert_untouched()


@pytest.mark.parametrize(
    "cls", [fogzo.FogzoEstimator, fogzo.SpsaEstimator, fogzo.ControlVariateEstimator]
)
def test_a_missing_closure_is_refused(cls):
    setup = Setup()
    setup.estimator = cls(setup.weights)
    with refused("estimator.refine_grads_(lambda: loss_fn(model(x), y))"):
        setup.estimator.refine_grads_()
    setup.assert_untouched()


@pytest.mark.parametrize(
    ("made_of", "shows"),
    [
        (lambda loss: torch.stack([loss, loss]), "closure=lambda: losses.mean()"),
        (lambda loss: loss.reshape(1), "closure=lambda: losses.mean()"),
        (lambda loss: None, "closure=lambda: model(**batch).loss"),
        (lambda loss: {"loss": loss}, "closure=lambda: model(**batch).loss"),
        (lambda loss: (loss, None), "closure=lambda: model(**batch).loss"),
        (lambda loss: "1.0", "closure=lambda: model(**batch).loss"),
        (lambda loss: loss + 0j, "losses.mean()"),
    ],
    ids=["vector", "vector of one", "None", "dict", "tuple", "text", "complex"],
)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_closure_that_returns_no_scalar_is_refused(made_of, shows, after):
    setup = Setup()
    calls = []

    def closure():
        calls.append(0)
        loss = setup.loss_of()
        return loss if len(calls) <= after else made_of(loss)

    with refused(shows) as error:
        setup.estimator.refine_grads_(closure, expected_loss=setup.loss)
    assert "the scalar loss that backward() differentiated" in str(error.value)
    setup.assert_untouched()


@pytest.mark.parametrize("factor", [2.0, 0.25, -1.0, 1.02])
def test_another_loss_than_backwards_is_refused_at_the_first_step(factor):
    setup = Setup()
    with refused("with estimator.record_rng(): loss = ...") as error:
        setup.estimator.refine_grads_(lambda: factor * setup.loss_of(), expected_loss=setup.loss)
    assert "accumulation steps" in str(error.value)
    setup.assert_untouched()


def test_another_batch_than_backwards_is_refused_also_after_a_refused_call():
    setup = Setup()
    batches = [setup.x, setup.x.flip(1)]
    for _ in range(2):
        with refused("rebound to the next batch"):
            setup.estimator.refine_grads_(
                lambda: mse_loss(setup.model(batches[1]), setup.y), expected_loss=setup.loss
            )
        setup.assert_untouched()
    stats = setup.estimator.refine_grads_(setup.loss_of, expected_loss=setup.loss)
    assert (stats.step, stats.fallback) == (0, None)


def test_a_first_step_that_falls_back_does_not_use_up_the_audit():
    setup = Setup()
    with pytest.warns(RuntimeWarning, match="not finite"):
        setup.estimator.refine_grads_(lambda: math.nan, expected_loss=math.nan)
    with refused("estimator.record_rng()"):
        setup.estimator.refine_grads_(lambda: 2 * setup.loss_of(), expected_loss=setup.loss)
    setup.assert_untouched(step=1)


@pytest.mark.parametrize("expected", ["tensor", "number"])
def test_the_expected_loss_may_be_a_number(expected):
    setup = Setup()
    loss = setup.loss if expected == "tensor" else setup.loss.item()
    assert setup.estimator.refine_grads_(setup.loss_of, expected_loss=loss).fallback is None


def test_the_audit_costs_one_forward_of_the_first_step():
    setup = Setup()
    calls = []

    def closure():
        calls.append(0)
        return setup.loss_of()

    for forwards in (3, 5):
        setup.estimator.refine_grads_(closure, expected_loss=setup.loss)
        assert len(calls) == forwards
        setup.model.zero_grad()
        setup.loss_of().backward()


@pytest.mark.parametrize("cls", [fogzo.FogzoEstimator, fogzo.ControlVariateEstimator])
@pytest.mark.parametrize("what", ["another model", "a cached loss"])
def test_a_loss_that_ignores_the_weights_is_refused(cls, what):
    setup = Setup()
    setup.estimator = cls(setup.weights)
    other = copy.deepcopy(setup.model)

    def closure():
        return setup.loss if what == "a cached loss" else mse_loss(other(setup.x), setup.y)

    with refused("fogzo.quantized_weights(model)") as error:
        setup.estimator.refine_grads_(closure)
    assert "does not depend on the quantized weights" in str(error.value)
    setup.assert_untouched()


def test_without_a_gradient_nobody_knows_whether_the_loss_should_depend_on_the_weights():
    setup = Setup(backward=False)
    setup.estimator = fogzo.SpsaEstimator(setup.weights)
    other = copy.deepcopy(setup.model)
    with pytest.warns(RuntimeWarning, match="Does the closure evaluate the model"):
        stats = setup.estimator.refine_grads_(lambda: mse_loss(other(setup.x), setup.y))
    assert stats.fallback == "the probes do not change the loss"
    setup.assert_untouched(step=1)


def test_a_loss_that_merely_stays_the_same_at_first_is_not_refused():
    # So small a perturbation that no weight is rounded differently.
    weight = nn.Parameter(torch.full((4, 4), 0.25))
    weight.grad = torch.ones(4, 4)
    estimator = fogzo.FogzoEstimator([("w", weight, 0.5)], noise_share=1e-6)
    with pytest.warns(RuntimeWarning, match="do not change the loss"):
        stats = estimator.refine_grads_(lambda: ((weight / 0.5).floor() + 0.5).sum())
    assert stats.fallback == "the probes do not change the loss"
    assert torch.equal(weight.grad, torch.ones(4, 4))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, "8", None, torch.ones(2)])
def test_a_gradient_scale_that_cannot_be_undone_is_refused(scale):
    setup = Setup()
    with refused("scaler.get_scale()"):
        setup.estimator.refine_grads_(setup.loss_of, grad_scale=scale)
    setup.assert_untouched()


def test_a_misspelt_argument_is_not_swallowed():
    setup = Setup()
    with pytest.raises(TypeError):
        fogzo.FogzoEstimator(setup.weights, noise=0.1)


# One refinement per backward pass


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("cls", [fogzo.FogzoEstimator, fogzo.PlaceboEstimator])
def test_gradients_are_refined_once(cls, same):
    setup = Setup(backward=False)
    model, weights = setup.model, setup.weights
    first = cls(weights)
    second = first if same else fogzo.FogzoEstimator(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # and a second step is fine
        optimizer.zero_grad(set_to_none=False)
        setup.loss_of().backward()
        first.refine_grads_(setup.loss_of)
        grads = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=r"refined already.*once per step"):
            second.refine_grads_(setup.loss_of)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert torch.equal(p.grad, grad)
        optimizer.step()


def test_parameters_that_were_replaced_are_noticed():
    setup = Setup(backward=False)
    setup.model[0]._parameters["weight"] = copy.deepcopy(setup.model[0].weight)
    setup.loss_of().backward()
    with refused("'0.weight' is no parameter of its model any more"):
        setup.estimator.refine_grads_(setup.loss_of)


def test_a_model_that_was_baked_in_is_noticed():
    setup = Setup(backward=False)
    fogzo.dequantize_(setup.model)
    setup.loss_of().backward()
    with refused("a Linear has no step sizes since fogzo.dequantize_"):
        setup.estimator.refine_grads_(setup.loss_of)


# Checkpoints


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"step": 3},
        {"step": 3, "seed": 1, "lr": 0.1},
        {"model": {}, "optimizer": {}},
        {"step": "seven", "seed": 0},
        {"step": None, "seed": 0},
        None,
    ],
    ids=["empty", "no seed", "too much", "a checkpoint", "text", "no step", "None"],
)
def test_a_broken_state_is_refused(state):
    setup = Setup()
    setup.estimator.refine_grads_(setup.loss_of)
    before = setup.estimator.state_dict()
    with refused("estimator.load_state_dict(checkpoint['estimator'])"):
        setup.estimator.load_state_dict(state)
    assert setup.estimator.state_dict() == before == {"step": 1, "seed": 0}


# What is not a mistake: losses that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [0, 1])
def test_a_loss_that_is_not_finite_is_warned_about_once_and_leaves_the_gradient(value, call):
    setup = Setup(num_samples=2)
    calls = []

    def closure():
        calls.append(0)
        loss = setup.loss_of()
        return torch.full_like(loss, value) if len(calls) % 4 == call else loss

    with pytest.warns(RuntimeWarning, match="first-order gradient") as told:
        stats = setup.estimator.refine_grads_(closure)
    assert len(told) == 1
    setup.assert_untouched(step=1)
    assert "not finite" in stats.fallback
    assert stats.agreement is None
    assert len(stats.probe_losses) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = setup.estimator.refine_grads_(closure)
    setup.assert_untouched(step=2)
    assert "not finite" in stats.fallback
    stats = setup.estimator.refine_grads_(setup.loss_of)
    assert stats.fallback is None


def test_the_warning_points_at_the_callers_line():
    setup = Setup()
    with pytest.warns(RuntimeWarning) as told:
        setup.estimator.refine_grads_(lambda: math.nan)
    assert told[0].filename == __file__


def test_a_noise_share_that_drowns_the_gradient_is_mentioned_with_a_better_one(caplog):
    layer = torch.nn.Linear(400, 400)
    fogzo.quantize_(layer, fogzo.fixed(2), lambda module, name: True)
    weights = fogzo.quantized_weights(layer)
    fogzo.FogzoEstimator(weights, noise_share=1e-4)
    assert not caplog.records
    fogzo.FogzoEstimator(weights, noise_share=1e-3)
    assert "kappa=1 is noise_share=6.2e-06" in caplog.text
