from dataclasses import replace

import pytest
import torch
from torch import nn

import fogzo
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.model_config import (
    DeitConfig,
    LlamaConfig,
    MlpConfig,
    QuantizerConfig,
    ResNetConfig,
)
from fogzo_lab.training.models import Shapes, blocks, build_model, checkpoint_blocks_, logits

IMAGES = Shapes(num_outputs=10, channels=3, image_size=8)
TEXT = Shapes(num_outputs=64, context=16)
FAMILIES = {
    "mlp": (MlpConfig(hidden=(16, 16)), IMAGES),
    "resnet18": (ResNetConfig(widths=(16, 32), depths=(1, 1), small_images=True), IMAGES),
    "resnet50": (
        ResNetConfig(widths=(16, 32), depths=(1, 1), bottleneck=True, small_images=True),
        IMAGES,
    ),
    "deit": (DeitConfig(width=16, depth=2, heads=2, patch_size=4), IMAGES),
    "llama": (LlamaConfig(width=16, depth=2, heads=2), TEXT),
}
PRESETS = ("fixed", "lsq", "quest", "bbq", "ternary", "sign")
# What the paper reports, or what the sizes of its models come to.
EMBEDDED = {
    "digits-mlp": (Shapes(10, 1, 8), 2_410),
    "digits-resnet": (Shapes(10, 1, 8), 169_834),
    "digits-deit": (Shapes(10, 1, 8), 338_890),
    "pydoc-llama": (Shapes(256, context=128), 1_115_264),
}
PARAMETERS = {
    "mnist-mlp": (Shapes(10, 1, 28), 7_960),
    "resnet18": (Shapes(1000, 3, 224), 11_689_512),
    "resnet50": (Shapes(1000, 3, 224), 25_557_032),
    "deit-tiny": (Shapes(1000, 3, 224), 5_717_416),
    "deit-small": (Shapes(1000, 3, 224), 22_050_664),
    "llama-9m": (Shapes(32_000, context=512), 9.24e6),
    "llama-20m": (Shapes(32_000, context=512), 19.79e6),
    "llama-30m": (Shapes(32_000, context=512), 31.66e6),
    "llama-95m": (Shapes(50_304, context=512), 94.87e6),
    "llama-200m": (Shapes(50_304, context=512), 205.8e6),
    "llama-300m": (Shapes(50_304, context=512), 332.0e6),
}
FLOAT = QuantizerConfig(preset="none")


def config(family, **changes):
    model, _ = FAMILIES[family]
    recipe = RECIPES["pydoc-llama" if family == "llama" else "digits-resnet"]()
    return replace(recipe, model=model, **changes)


def inputs(shapes):
    stream = torch.Generator().manual_seed(0)
    if shapes.context:
        return torch.randint(shapes.num_outputs, (4, shapes.context), generator=stream)
    return torch.randn(4, shapes.channels, 8, 8, generator=stream)


@pytest.mark.parametrize("name", [*PARAMETERS, *EMBEDDED])
def test_the_networks_have_the_sizes_that_the_readme_states(name):
    shapes, expected = (PARAMETERS | EMBEDDED)[name]
    with torch.device("meta"):
        model = build_model(replace(RECIPES[name](), quantizer=FLOAT), shapes)
    count = sum(param.numel() for param in model.parameters())
    assert count == pytest.approx(expected, rel=1e-9 if isinstance(expected, int) else 5e-4)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "mnist-mlp"])
def test_the_small_variants_are_the_same_networks(name):
    small, full = RECIPES[f"{name}-small"]().model, RECIPES[name]().model
    ignored = {"patch_size": 16, "small_images": False} if name[0] in "dr" else {}
    known = {field: value for field, value in ignored.items() if hasattr(small, field)}
    assert replace(small, **known) == full


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_quantizer_leaves_the_first_and_the_last_layer_of_every_family(family, preset):
    _, shapes = FAMILIES[family]
    model = build_model(config(family, quantizer=QuantizerConfig(preset=preset)), shapes)
    names = {weight.name for weight in fogzo.quantized_weights(model)}
    layers = [
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)
    ]
    assert names == set(layers[1:-1])
    both = config(
        family, quantizer=QuantizerConfig(preset="fixed"), quantize_first=True, quantize_last=True
    )
    everywhere = fogzo.quantized_weights(build_model(both, shapes))
    assert {weight.name for weight in everywhere} == set(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_follow_from_the_seed_and_leave_the_global_stream_alone(family):
    _, shapes = FAMILIES[family]
    state = torch.get_rng_state()
    a, b = (build_model(config(family), shapes) for _ in range(2))
    other = build_model(config(family, seed=1), shapes)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(
        not torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mlp"])
def test_checkpointed_blocks_give_the_same_gradients_and_count_a_batch_once(family):
    _, shapes = FAMILIES[family]
    results = []
    for checkpointed in (False, True):
        model = build_model(config(family), shapes)
        if checkpointed:
            checkpoint_blocks_(model)
            assert blocks(model)
        model.train()
        x = inputs(shapes)
        logits(model, x).square().mean().backward()
        results.append(
            [p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers())
        )
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


def test_shapes_that_do_not_fit_name_numbers_that_do():
    with pytest.raises(ValueError, match=r"--model.patch-size 2, or --data.image-size 6"):
        build_model(replace(config("deit"), model=DeitConfig(patch_size=6)), IMAGES)
    with pytest.raises(ValueError, match=r"--model.heads 2"):
        build_model(replace(config("llama"), model=LlamaConfig(width=16, heads=6)), TEXT)
    with pytest.raises(ValueError, match="as many widths as depths"):
        build_model(replace(config("resnet18"), model=ResNetConfig(widths=(8,))), IMAGES)
    with pytest.raises(ValueError, match="--quantize-first"):
        build_model(replace(config("mlp"), model=MlpConfig(hidden=(4,))), IMAGES)
