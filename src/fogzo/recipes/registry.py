"""The recipes: small functions that return a config."""

from collections.abc import Callable

from fogzo.recipes.config import DataConfig, QuantizerConfig, TrainConfig


def digits_mlp() -> TrainConfig:
    """A 2-bit multilayer perceptron 64-32-10 on scikit-learn's handwritten digits."""
    return TrainConfig(
        recipe="digits-mlp",
        quantizer=QuantizerConfig(preset="fixed", bits=2, init="abs_mean", everything=True),
        max_steps=500,
        batch_size=64,
    )


def mnist_mlp() -> TrainConfig:
    """The paper's shallow net, 784-10-10 with 2-bit weights, six epochs of MNIST."""
    return TrainConfig(
        recipe="mnist-mlp",
        quantizer=QuantizerConfig(preset="fixed", bits=2, init="abs_mean", everything=True),
        data=DataConfig(dataset="mnist", validation_fraction=0.1),
        hidden=(10,),
        max_steps=6 * 54_000 // 128,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "digits-mlp": digits_mlp,
    "mnist-mlp": mnist_mlp,
}
