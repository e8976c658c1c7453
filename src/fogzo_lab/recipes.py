"""The recipes: small functions that return a config.

Sizes are those of the paper's models (arXiv 2510.23926); its training settings are not public, so
images follow DeiT's and ResNet's own recipes and text follows QuEST's (arXiv 2502.05003). The
``-small`` variants are the same networks on small images or short contexts, for a CPU.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fogzo_lab.data.config import AugmentationConfig, ImagesConfig, TextConfig
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.model_config import (
    DeitConfig,
    LlamaConfig,
    MlpConfig,
    QuantizerConfig,
    ResNetConfig,
)

# The paper's STE, with its mask.
_ABS_MEAN = QuantizerConfig(preset="fixed", bits=2, surrogate="identity", init="abs_mean")
_LSQ = QuantizerConfig(preset="lsq", bits=2)


def digits_mlp() -> TrainConfig:
    """A 2-bit multilayer perceptron 64-32-10 on scikit-learn's handwritten digits."""
    return TrainConfig(
        recipe="digits-mlp",
        model=MlpConfig(hidden=(32,)),
        data=ImagesConfig(),
        quantizer=_ABS_MEAN,
        quantize_first=True,
        quantize_last=True,
        max_steps=500,
        batch_size=64,
    )


def mnist_mlp() -> TrainConfig:
    """The paper's shallow net, 784-10-10 with 2-bit weights, six epochs of MNIST."""
    return TrainConfig(
        recipe="mnist-mlp",
        model=MlpConfig(hidden=(10,)),
        data=ImagesConfig(dataset="mnist", validation_fraction=0.1),
        quantizer=_ABS_MEAN,
        quantize_first=True,
        quantize_last=True,
        max_steps=6 * 54_000 // 128,
    )


def digits_resnet() -> TrainConfig:
    """A 2-bit residual network of 0.2M parameters on scikit-learn's handwritten digits."""
    return TrainConfig(
        recipe="digits-resnet",
        model=ResNetConfig(widths=(32, 64), depths=(2, 2), small_images=True),
        data=ImagesConfig(augmentation=AugmentationConfig(crop="pad")),
        quantizer=_LSQ,
        max_steps=300,
        batch_size=64,
        weight_decay=0.01,
        checkpoint_every=100,
    )


def digits_deit() -> TrainConfig:
    """A 2-bit vision transformer of 0.3M parameters on scikit-learn's handwritten digits."""
    return TrainConfig(
        recipe="digits-deit",
        model=DeitConfig(width=96, depth=3, heads=3, patch_size=2),
        data=ImagesConfig(augmentation=AugmentationConfig(crop="pad")),
        quantizer=_LSQ,
        max_steps=1500,
        batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.05,
        clip_norm=1.0,
        checkpoint_every=250,
    )


def pydoc_llama() -> TrainConfig:
    """A 2-bit byte-level LLaMA of 1.1M parameters on the prose of Python's own help."""
    return TrainConfig(
        recipe="pydoc-llama",
        model=LlamaConfig(width=128, depth=4, heads=4),
        data=TextConfig(),
        quantizer=_LSQ,
        max_steps=1000,
        batch_size=16,
        learning_rate=3e-3,
        weight_decay=0.1,
        warmup_fraction=0.1,
        final_fraction=0.1,
        clip_norm=1.0,
        checkpoint_every=250,
    )


def resnet18() -> TrainConfig:
    """The paper's ResNet-18 with 2-bit weights on ImageNet-100."""
    return _resnet("resnet18", ResNetConfig())


def resnet50() -> TrainConfig:
    """The paper's ResNet-50 with 2-bit weights on ImageNet-100."""
    widths, depths = (256, 512, 1024, 2048), (3, 4, 6, 3)
    return _resnet("resnet50", ResNetConfig(widths=widths, depths=depths, bottleneck=True))


def deit_tiny() -> TrainConfig:
    """The paper's DeiT-Tiny with 2-bit weights on ImageNet-100."""
    return _deit("deit-tiny", DeitConfig(width=192, heads=3))


def deit_small() -> TrainConfig:
    """The paper's DeiT-Small with 2-bit weights on ImageNet-100."""
    return _deit("deit-small", DeitConfig(width=384, heads=6))


# Width, depth, heads, size of the vocabulary, learning rate, steps of 262,144 tokens.
_LLAMAS = {
    "llama-9m": (128, 4, 1, 32_000, 1.2e-3, 5_722),
    "llama-20m": (256, 4, 2, 32_000, 1.2e-3, 5_722),
    "llama-30m": (384, 4, 3, 32_000, 1.2e-3, 11_444),
    "llama-95m": (640, 6, 5, 50_304, 1.2e-3, 5_722),
    "llama-200m": (1024, 8, 8, 50_304, 6e-4, 19_073),
    "llama-300m": (1280, 10, 10, 50_304, 6e-4, 22_888),
}


def _llama(name: str) -> Callable[[], TrainConfig]:
    width, depth, heads, vocab_size, learning_rate, max_steps = _LLAMAS[name]

    def recipe() -> TrainConfig:
        return TrainConfig(
            recipe=name,
            model=LlamaConfig(width=width, depth=depth, heads=heads, vocab_size=vocab_size),
            data=TextConfig(
                dataset="allenai/c4",
                subset="en",
                tokenizer="huggyllama/llama-7b",
                streaming=True,
                context=512,
            ),
            quantizer=_LSQ,
            max_steps=max_steps,
            batch_size=512,
            accumulation=8,
            learning_rate=learning_rate,
            schedule="onecycle",
            warmup_fraction=0.1,
            final_fraction=0.1,
            weight_decay=0.1,
            clip_norm=1.0,
            precision="bf16",
            log_every=20,
            checkpoint_every=500,
        )

    recipe.__doc__ = f"The paper's LLaMA of {name[6:].upper()} parameters with 2-bit weights on C4."
    return recipe


def _resnet(name: str, model: ResNetConfig) -> TrainConfig:
    return TrainConfig(
        recipe=name,
        model=model,
        data=_imagenet_100(crop="resized", flip=True, label_smoothing=0.1),
        quantizer=_LSQ,
        max_steps=90 * 120_000 // 256,
        batch_size=256,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-4,
        precision="bf16",
        log_every=50,
        checkpoint_every=1000,
    )


def _deit(name: str, model: DeitConfig) -> TrainConfig:
    return TrainConfig(
        recipe=name,
        model=model,
        data=_imagenet_100(
            crop="resized", flip=True, rand_augment=9, mixup=0.8, cutmix=1.0, label_smoothing=0.1
        ),
        quantizer=_LSQ,
        max_steps=300 * 120_000 // 1024,
        batch_size=1024,
        learning_rate=1e-3,
        weight_decay=0.05,
        clip_norm=1.0,
        precision="bf16",
        log_every=50,
        checkpoint_every=1000,
    )


def _imagenet_100(**augmentation: Any) -> ImagesConfig:
    return ImagesConfig(
        dataset="imagenet-100",
        image_size=224,
        validation_fraction=0.05,
        augmentation=AugmentationConfig(**augmentation),
        workers=8,
    )


def _small(recipe: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """The same network on embedded data, small enough for a CPU."""

    def small_recipe() -> TrainConfig:
        config = recipe()
        model, data = config.model, config.data
        if isinstance(model, ResNetConfig):
            model = replace(model, small_images=True)
        elif isinstance(model, DeitConfig):
            model = replace(model, patch_size=2)
        if isinstance(data, TextConfig):
            data = TextConfig(max_eval_blocks=128)
        else:
            crop = AugmentationConfig(crop="pad")
            data = ImagesConfig(augmentation=crop, max_eval_images=2048)
        return replace(
            config,
            recipe=f"{config.recipe}-small",
            model=model,
            data=data,
            max_steps=200,
            batch_size=16 if isinstance(data, TextConfig) else 64,
            accumulation=1,
            precision="fp32",
            log_every=5,
            checkpoint_every=50,
        )

    where = "text and short contexts" if "llama" in recipe().recipe else "digits"
    small_recipe.__doc__ = f"{recipe().recipe} itself on embedded {where}, for a CPU."
    return small_recipe


_PAPERS: dict[str, Callable[[], TrainConfig]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "deit-tiny": deit_tiny,
    "deit-small": deit_small,
    **{name: _llama(name) for name in _LLAMAS},
}

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "digits-mlp": digits_mlp,
    "digits-resnet": digits_resnet,
    "digits-deit": digits_deit,
    "pydoc-llama": pydoc_llama,
    "mnist-mlp": mnist_mlp,
    **_PAPERS,
    **{f"{name}-small": _small(recipe) for name, recipe in _PAPERS.items()},
}
"""Every recipe by its name on the command line."""
