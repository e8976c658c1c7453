"""Recipes cut down to seconds: the same families, quantizers and options, smaller shapes."""

from dataclasses import replace

from fogzo_lab.data.config import ImagesConfig, TextConfig
from fogzo_lab.training.model_config import DeitConfig, LlamaConfig, ResNetConfig


def shrunk(config, **changes):
    """A config of the same kind that takes two steps on embedded data."""
    model, data = config.model, config.data
    if isinstance(model, ResNetConfig):
        model = replace(model, widths=(16, 32), depths=(1, 1), small_images=True)
    elif isinstance(model, DeitConfig):
        model = replace(model, width=16, depth=1, heads=2, patch_size=2)
    elif isinstance(model, LlamaConfig):
        model = replace(model, width=16, depth=1, heads=2, vocab_size=None)
    if isinstance(data, TextConfig):
        data = TextConfig(context=16, max_eval_blocks=8)
    else:
        data = ImagesConfig(augmentation=data.augmentation, max_eval_images=64)
    small = {"max_steps": 2, "batch_size": 8, "accumulation": 2, "checkpoint_every": -1}
    return replace(config, **({"model": model, "data": data} | small | changes))
