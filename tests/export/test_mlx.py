import json

import numpy as np
import pytest
import torch
from networks import llama, quantized, tied_llama, vit
from safetensors import safe_open
from safetensors.numpy import load_file

import fogzo
from fogzo.export import export
from fogzo.export.source import Options, Source

DTYPES = [torch.float16, torch.bfloat16]
WEIGHTS = {
    "half2": lambda d: fogzo.lsq(2, scale_dtype=d),
    "half2-channel": lambda d: fogzo.lsq(2, granularity="channel", scale_dtype=d),
    "half2-g32": lambda d: fogzo.lsq(2, granularity=32, scale_dtype=d),
    "int3": lambda d: fogzo.lsq(3, scale_dtype=d),
    "half3": lambda d: fogzo.lsq(3, levels="half", scale_dtype=d),
    "int4-g32": lambda d: fogzo.fixed(4, granularity=32, scale_dtype=d),
    "half4": lambda d: fogzo.lsq(4, levels="half", scale_dtype=d),
    "int5": lambda d: fogzo.lsq(5, scale_dtype=d),
    "int8": lambda d: fogzo.abs_max(8, scale_dtype=d),
    "ternary": lambda d: fogzo.ternary(scale_dtype=d),
    "sign": lambda d: fogzo.sign(scale_dtype=d),
}


def mx_dequantize(w, scales, biases, group_size, bits):
    """mx.dequantize in numpy: a loop over the little-endian stream of bits, one rounding each."""
    stream = np.unpackbits(w.view(np.uint8), axis=1, bitorder="little")
    powers = 2 ** np.arange(bits, dtype=np.int64)
    u = (stream.reshape(len(w), -1, bits) * powers).sum(-1).reshape(len(w), -1, group_size)
    product = scales[..., None].astype(np.float32) * u.astype(np.float32)
    return (product + biases[..., None].astype(np.float32)).reshape(len(w), -1)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_mlx_dequantizes_to_the_trained_weights(name, scale_dtype, tmp_path):
    model = quantized(llama(), WEIGHTS[name](scale_dtype))
    report = export(model, tmp_path / "out", "mlx")
    assert all(layer.exact for layer in report.layers)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
        for layer_name, layer in Source.of(model, Options()).layers.items():
            w = file.get_tensor(f"{layer_name}.weight").numpy()
            scales, biases = (
                file.get_tensor(f"{layer_name}.{part}").float().numpy()
                for part in ("scales", "biases")
            )
            found = mx_dequantize(w, scales, biases, **settings[layer_name])
            assert (found == layer.weight.dequantize().numpy()).all()


def scale_dtypes_of(folder):
    return {
        value.dtype.name
        for name, value in load_file(folder / "model.safetensors").items()
        if name.endswith((".scales", ".biases"))
    }


@pytest.mark.parametrize(
    ("quantizer", "stored"),
    [
        (fogzo.lsq(4, scale_dtype=torch.float16), "float16"),
        (fogzo.lsq(2, levels="integer", scale_dtype=torch.float16), "float16"),
        (fogzo.sign(scale_dtype=torch.float16), "float16"),
        # 1.5 times a step of 11 bits has 12 or 13.
        (fogzo.lsq(2, granularity=32, scale_dtype=torch.float16), "float32"),
    ],
)
def test_scales_are_as_narrow_as_is_exact(quantizer, stored, tmp_path):
    export(quantized(llama(), quantizer), tmp_path / "out", "mlx")
    assert scale_dtypes_of(tmp_path / "out") == {stored}


@pytest.mark.parametrize("make", [tied_llama, vit])
def test_other_networks(make, tmp_path):
    model = quantized(make(), fogzo.lsq(2, scale_dtype=torch.bfloat16))
    report = export(model, tmp_path / "out", "mlx")
    assert all(layer.exact for layer in report.layers)


def test_the_config_has_the_entries_that_mlx_looks_for(tmp_path):
    export(quantized(llama(), WEIGHTS["half2"](torch.float16)), tmp_path / "out", "mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0
    assert config["quantization"]["bits"] == 2
    assert config["quantization"]["group_size"] == 64
    assert config["quantization_config"] == config["quantization"]


def test_steps_in_float32_are_rounded_only_if_that_is_asked_for(tmp_path):
    model = quantized(llama(), fogzo.lsq(2))
    with pytest.raises(ValueError, match="step sizes are no float16 or bfloat16"):
        export(model, tmp_path / "out", "mlx")
    assert not list(tmp_path.iterdir())
    report = export(model, tmp_path / "out", "mlx", round_steps=True)
    assert all(0 < layer.step_rounding < 2**-8 for layer in report.layers)
