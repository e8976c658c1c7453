from importlib.util import find_spec

import pytest
import torch
from networks import llama, logits, quantized, source_of, tied_llama, vit

import fogzo
from fogzo.export.torchao import to_torchao

pytestmark = [
    # Found and not imported, which takes seconds, in every process that collects tests.
    pytest.mark.skipif(find_spec("torchao") is None, reason="its tensors hold the weights"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.mark.parametrize(
    "quantizer",
    [
        fogzo.lsq(1),
        fogzo.lsq(2, granularity="channel"),
        fogzo.lsq(2, levels="integer"),
        fogzo.lsq(3, granularity=32),
        fogzo.lsq(4, levels="half"),
        fogzo.fixed(8),
        fogzo.ternary(),
        fogzo.sign(),
    ],
    ids=lambda q: f"{q.grid.name}-{q.granularity}",
)
def test_the_copy_computes_with_the_trained_weights(quantizer):
    model = quantized(llama(), quantizer)
    served = to_torchao(model)
    for name, layer in source_of(model).layers.items():
        weight = served.get_submodule(name).weight
        assert type(weight).__name__ == "IntxUnpackedToInt8Tensor"
        assert torch.equal(weight.dequantize(), layer.weight.dequantize())
    assert torch.equal(logits(served), logits(model))
    assert isinstance(model.model.layers[0].mlp.up_proj, fogzo.QuantizedLayer)


@pytest.mark.parametrize("make", [tied_llama, vit])
def test_other_networks(make):
    model = quantized(make(), fogzo.lsq(2))
    assert torch.equal(logits(to_torchao(model)), logits(model))


def test_quantized_inputs_are_refused_unless_they_are_dropped():
    model = quantized(llama(), fogzo.lsq(4), fogzo.lsq(8))
    with pytest.raises(ValueError, match="as torchao: its inputs are quantized"):
        to_torchao(model)
    assert logits(to_torchao(model, activations="drop")).isfinite().all()
