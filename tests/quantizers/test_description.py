"""Quantizers as plain values and back."""

import dataclasses
import json

import pytest
import torch

import fogzo
from fogzo.quantizers import Quantizer, Surrogate, surrogates
from fogzo.quantizers.description import describe, from_description
from fogzo.quantizers.smoothing import Logistic, Scaled, SmoothingLaw, Uniform
from toolbox import PRESETS

CASES = {
    **{name: make() for name, make in PRESETS.items()},
    "bbq": fogzo.bbq(2),
    "given step": fogzo.fixed(2, step_size=0.1, granularity=4, scale_dtype=torch.float16),
    "named": fogzo.lsq(2, surrogate="erf"),
    "named, with a kernel": fogzo.lsq(2, surrogate="stable_qat"),
    "of a width": fogzo.sign(surrogate=surrogates.tanh(3.0)),
    "never masked": fogzo.lsq(2, surrogate=surrogates.identity_unmasked(2.0)),
    "of a scaled law": fogzo.lsq(
        2, surrogate=Surrogate("mine", Scaled(Uniform(), 2.0), Scaled(Uniform(), 2.0))
    ),
    "stochastic": dataclasses.replace(fogzo.lsq(2, surrogate="identity_unmasked"), stochastic=True),
    "noise": dataclasses.replace(fogzo.lsq(2), noise=1e-3),
    "drawn": dataclasses.replace(fogzo.fixed(2), surrogate="adjacent", stochastic=True),
    "drawn by a law": dataclasses.replace(
        fogzo.fixed(2), surrogate=surrogates.adjacent(Logistic(3.0), 1.0, 0.2), stochastic=True
    ),
}


@pytest.mark.parametrize("quantizer", CASES.values(), ids=CASES.keys())
def test_a_quantizer_survives_json(quantizer):
    text = json.dumps(describe(quantizer), allow_nan=False)
    assert from_description(json.loads(text)) == quantizer


def test_no_field_is_left_out():
    described = describe(fogzo.lsq(2, surrogate=surrogates.tanh(3.0)))
    fields = {f.name for f in dataclasses.fields(Quantizer) if f.init}
    assert described.keys() == fields
    fields = {f.name for f in dataclasses.fields(Surrogate) if f.init}
    assert described["surrogate"].keys() == fields - {"kernel"}  # a function, which is refused


def test_files_of_earlier_versions_are_read():
    quantizer = fogzo.lsq(2, surrogate=surrogates.tanh(3.0))
    described = describe(quantizer)
    del described["noise"], described["surrogate"]["least_probability"]
    assert from_description(described) == quantizer


def test_what_only_code_knows_is_refused():
    with pytest.raises(ValueError, match="'mine' has a kernel of its own"):
        describe(fogzo.lsq(2, surrogate=Surrogate("mine", None, Uniform(), kernel=abs)))

    class Own(Uniform):
        """A law of one's own."""

    law: SmoothingLaw = Own()
    with pytest.raises(ValueError, match="smoothing law Own is your own"):
        describe(fogzo.lsq(2, surrogate=Surrogate("mine", law, law)))


@pytest.mark.parametrize("quantizer", CASES.values(), ids=CASES.keys())
def test_on_the_meta_device_there_are_gradients(quantizer):
    weight = torch.empty(8, 16, device="meta", requires_grad=True)
    step = quantizer.empty_step_size(weight)
    step = step.requires_grad_() if step is not None and quantizer.scale.kind == "learned" else step
    quantizer(weight, step, training=True).sum().backward()
    assert weight.grad.shape == weight.shape
    assert step is None or not step.requires_grad or step.grad.shape == step.shape


@pytest.mark.parametrize("quantizer", CASES.values(), ids=CASES.keys())
def test_on_the_meta_device_there_are_shapes(quantizer):
    weight, real = torch.empty(8, 16, device="meta"), torch.randn(8, 16)
    step, expected = quantizer.empty_step_size(weight), quantizer.initial_step_size(real)
    if expected is None:
        assert step is None
    else:
        assert step.shape == expected.shape and step.is_meta
    assert quantizer(weight, step).shape == weight.shape
