"""The paper's comparisons, and of other methods, at a size that two CPU cores train.

    python experiments/paper.py [NAME ...] [--plan] [--workers 2]

Without names all of them, hours of work; finished runs are never repeated. Each comparison is what
`fogzo compare` runs and writes its config.json, results.json and report.html into
experiments/NAME. The data, laid out as on the hub, is expected in data/.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fogzo_lab.cli import display
from fogzo_lab.comparison.compare import CompareConfig, compare, plan
from fogzo_lab.comparison.report import write_compare_report
from fogzo_lab.data.config import ImagesConfig, TextConfig
from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.model_config import DeitConfig, LlamaConfig, QuantizerConfig, ResNetConfig

EXPERIMENTS = Path("experiments")
CORE_ROWS = ("ste", "ste-unmasked", "placebo", "fogzo")
SGD_ROWS = (*CORE_ROWS, "lambda", "control-variate", "spsa")
MIXED_ROWS = (*CORE_ROWS, "ste-then-fogzo")
CHEAPER_ROWS = (*CORE_ROWS, "fogzo-one-sided", "fogzo-eighth", "fogzo-every-4")
LAW_ROWS = tuple(f"fogzo-{law}" for law in ("triangular", "normal", "logistic", "rademacher"))
LAW_ROWS = (*CORE_ROWS, *LAW_ROWS)

METHOD_ROWS = ("float", "ptq", *CORE_ROWS, "ste-stable-qat", "ste-bbq", "float-then-ste")
METHOD_ROWS += ("ste-cage", "ste-winq", "ste-dampening", "ste-cewt", "parq")
LINEAR_ROWS = (*CORE_ROWS, "fogzo-linear")
PUBLISHED_ROWS = ("ste-cage-published", "ste-winq-published", "ste-dampening-published")

LONG_ROWS = ("float", *CORE_ROWS, "fogzo-every-4", "float-then-ste", "ste-cage-published")
WIDE_ROWS = ("float", *CORE_ROWS, "float-then-ste", "ste-cage-published", "ste-winq-published")
LAST_ROWS = ("parq", "ste-bbq")

FIXED = QuantizerConfig(preset="fixed", bits=2, surrogate="identity")
TANH = replace(FIXED, surrogate="tanh")
LSQ = QuantizerConfig(preset="lsq", bits=2)
QUEST = QuantizerConfig(preset="quest", bits=2)
LITERAL: dict[str, Any] = {"agreement": "measured"}
"""The paper's estimator takes the measured agreement as it is."""

THREE_SEEDS = ("cifar-deit-tanh", "cifar-resnet-tanh")
"""Deep comparisons that got three seeds instead of five, for want of time."""

SURROGATES = {
    "identity": "identity",
    "hardtanh": "hardtanh",
    "tanh": "tanh",
    "approx-sign": "approx_sign",
}


def comparisons() -> dict[str, CompareConfig]:
    """Every comparison by its folder's name."""
    mnist, images, text = mnist_mlp(), deep_images(), shakespeare_llama()
    found = {
        "mnist-mlp-adamw": every_row(mnist),
        "mnist-mlp-sgd": sgd_grid(replace(mnist, optimizer="sgd", learning_rate=0.1)),
    }
    short = replace(mnist, max_steps=mnist.max_steps // 2)
    for name, surrogate in SURROGATES.items():
        if name != "identity":  # that is mnist-mlp-adamw
            quantizer = replace(mnist.quantizer, surrogate=surrogate)
            found[f"mnist-mlp-{name}"] = small(replace(short, quantizer=quantizer))
        for model, recipe in images.items():
            fixed = replace(FIXED, surrogate=surrogate)
            # Equal time says the same of all four surrogates, as a step costs the same.
            equal_time = name in ("identity", "tanh")
            found[f"{model}-{name}"] = deep(replace(recipe, quantizer=fixed), equal_time=equal_time)
    for name in ("identity", "tanh"):
        fixed = replace(FIXED, surrogate=name)
        rows = MIXED_ROWS if name == "identity" else CORE_ROWS
        found[f"shakespeare-llama-{name}"] = deep(replace(text, quantizer=fixed), rows=rows)
    for preset in ("lsq", "quest"):
        quantizer = QuantizerConfig(preset=preset, bits=2)
        weights = replace(short, quantizer=quantizer)
        found[f"mnist-mlp-{preset}-w2"] = small(weights)
        found[f"mnist-mlp-{preset}-w2a2"] = small(replace(weights, activations=quantizer))
        both = replace(text, quantizer=quantizer, activations=quantizer)
        found[f"shakespeare-llama-{preset}-w2a2"] = deep(both, equal_time=False)
    # The deep networks' kappa, tuned as openly as their learning rate.
    for model, recipe in (("cifar-deit", images["cifar-deit"]), ("shakespeare-llama", text)):
        tuned = deep(replace(recipe, quantizer=FIXED), equal_time=False)
        found[f"{model}-kappa"] = replace(tuned, kappas=(1e-4, 1e-3, 1e-2, 0.1))
    lsq = replace(images["cifar-deit"], quantizer=LSQ)
    found["cifar-deit-lsq-w2"] = deep(lsq, equal_time=False)
    found["cheaper-probes-mnist-mlp"] = small(short, rows=CHEAPER_ROWS)
    # Neither law nor radius changes what a step costs.
    found["laws-mnist-mlp"] = small(short, rows=LAW_ROWS, equal_time=False)
    for radius in (0.5, 2.0):
        found[f"radius-{radius:g}-mnist-mlp"] = small(
            replace(short, radius=radius), equal_time=False
        )
    rates, all_rows = (9.49e-4, 3e-3, 9.49e-3, 0.03), METHOD_ROWS + PUBLISHED_ROWS
    found["methods-mnist-mlp"] = methods(FIXED, METHOD_ROWS, rates)
    found["methods-mnist-mlp-lsq"] = methods(LSQ, all_rows, rates[1:], equal_time=False)
    linear = methods(FIXED, LINEAR_ROWS, rates[:3], equal_time=False)
    found["linear-mnist-mlp"] = replace(linear, kappas=(1.0,), tuning_seeds=2)
    for bits in (1, 3, 4):
        quantizer = replace(FIXED, bits=bits)
        found[f"bits-{bits}-mnist-mlp"] = methods(quantizer, CORE_ROWS, rates, equal_time=False)
    found |= long_comparisons(images, text)
    for name in THREE_SEEDS:
        found[name] = replace(found[name], num_seeds=3)
    return {
        name: replace(config, base=replace(config.base, output_dir=EXPERIMENTS / name))
        for name, config in found.items()
    }


def mnist_mlp() -> TrainConfig:
    """784-10-10, six epochs."""
    recipe = replace(RECIPES["mnist-mlp"](), kappa=0.1, noise_shape="isotropic", **LITERAL)
    return replace(recipe, data=replace(recipe.data, dataset="data/mnist"), log_every=50)


def methods(
    quantizer: QuantizerConfig, rows: tuple[str, ...], rates: tuple[float, ...], **options: Any
) -> CompareConfig:
    """The methods that a user would weigh, three epochs, FOGZO with the defaults."""
    recipe = replace(RECIPES["mnist-mlp"](), quantizer=quantizer, log_every=50)
    data = replace(recipe.data, dataset="data/mnist")
    base = replace(recipe, data=data, max_steps=recipe.max_steps // 2)
    kappas = (1e-3, 0.03, 1.0)
    return CompareConfig(
        base=base, rows=rows, learning_rates=rates, kappas=kappas, tuning_seeds=1, **options
    )


def deep_images() -> dict[str, TrainConfig]:
    """DeiT and ResNet-18 in shape, 64 and 8 to 64 wide, on CIFAR-10 of 16x16 pixels."""
    data = ImagesConfig(
        dataset="data/cifar10", image_size=16, validation_fraction=0.1, max_eval_images=5000
    )
    both: dict[str, Any] = {"data": data, "batch_size": 32, "max_steps": 600, "kappa": 0.01}
    both |= LITERAL
    resnet = ResNetConfig(widths=(8, 16, 32, 64), depths=(2, 2, 2, 2), small_images=True)
    return {
        "cifar-deit": replace(
            RECIPES["digits-deit"](),
            model=DeitConfig(width=64, depth=4, heads=2, patch_size=4),
            learning_rate=3e-3,
            **both,
        ),
        "cifar-resnet": replace(
            RECIPES["digits-resnet"](), model=resnet, learning_rate=1e-2, **both
        ),
    }


def shakespeare_llama() -> TrainConfig:
    """LLaMA-9M in shape, half as wide, on the bytes of Shakespeare's plays."""
    return replace(
        RECIPES["pydoc-llama"](),
        model=LlamaConfig(width=64, depth=4, heads=1),
        data=TextConfig(dataset="data/shakespeare/input.txt", context=64, max_eval_blocks=1024),
        batch_size=8,
        max_steps=450,
        learning_rate=1e-2,
        kappa=0.01,
        **LITERAL,
    )


def every_row(base: TrainConfig) -> CompareConfig:
    """The widest comparison, with kappa tuned too."""
    rows = ("float", "ptq", "ste", "ste-unmasked", "ste-stochastic", "placebo", "lambda", "fogzo")
    rows += ("control-variate", "spsa")
    return CompareConfig(base=base, rows=rows, kappas=(0.01, 0.1, 1.0), tuning_seeds=1)


def small(base: TrainConfig, rows: tuple[str, ...] = CORE_ROWS, **options: Any) -> CompareConfig:
    """Five seeds, one of which chooses among four learning rates."""
    rates = tuple(float(f"{base.learning_rate * f:.3g}") for f in (0.1, 10**-0.5, 1.0, 10**0.5))
    return CompareConfig(base=base, rows=rows, learning_rates=rates, tuning_seeds=1, **options)


def sgd_grid(base: TrainConfig) -> CompareConfig:
    """As `small`, on a grid wide enough for SGD, whose rows prefer rates far from each other."""
    rates = (1e-3, 3.16e-3, 1e-2, 3.16e-2, 0.1, 0.316, 1.0)
    return replace(small(base, rows=SGD_ROWS), learning_rates=rates)


HALF_DECADES = {
    "deit": (0.1, 10**-0.5, 1.0),
    "resnet": (10**-0.5, 1.0, 10**0.5),
    "llama": (0.1, 10**-0.5, 1.0, 10**0.5),
}
"""Grids, relative to a recipe's learning rate, that hold what the rows of a family prefer."""


def deep(base: TrainConfig, rows: tuple[str, ...] = CORE_ROWS, **options: Any) -> CompareConfig:
    """Five seeds, one of which chooses among the learning rates."""
    factors = HALF_DECADES[base.model.family]
    rates = tuple(float(f"{base.learning_rate * factor:.3g}") for factor in factors)
    return CompareConfig(
        base=base, rows=rows, learning_rates=rates, num_seeds=5, tuning_seeds=1, **options
    )


def long_comparisons(images: dict[str, TrainConfig], text: TrainConfig) -> dict[str, CompareConfig]:
    """Those at the length where quantization decides."""
    identity, tanh, lsq = (replace(text, quantizer=each) for each in (FIXED, TANH, LSQ))
    deit, resnet = (replace(images[f"cifar-{n}"], quantizer=FIXED) for n in ("deit", "resnet"))
    quest, quest_deit, quest_resnet = (
        replace(each, quantizer=QUEST, activations=QUEST) for each in (text, deit, resnet)
    )
    rates, lower = (1e-3, 3.16e-3, 1e-2), (3e-4, 9.49e-4, 3e-3)
    kept = (*CORE_ROWS, "float-then-ste")
    return {
        "long-llama-identity": timed(long(identity, 3000, (*rates, 3.16e-2), kept)),
        "long-llama-tanh": long(tanh, 3000, (3.16e-4, *rates, 3.16e-2)),
        "long-llama-lsq-w2": long(lsq, 3000, rates, (*LONG_ROWS, *LAST_ROWS)),
        "long-llama-quest-w2a2": long(quest, 3000, rates),
        "long-deit-identity": timed(long(deit, 4000, lower, kept)),
        "long-deit-tanh": long(replace(deit, quantizer=TANH), 4000, lower),
        "long-deit-quest-w2a2": long(quest_deit, 4000, lower),
        "long-deit-lsq-w2": long(
            replace(deit, quantizer=LSQ), 4000, lower, (*WIDE_ROWS, *LAST_ROWS)
        ),
        # Most but FOGZO's runs are of those without "-inputs".
        "long-deit-quest-w2a2-inputs": long(quest_deit, 4000, lower),
        # At the rate that rows had chosen.
        "long-llama-quest-w2a2-inputs": long(quest, 3000, rates[1:2]),
        # Three seeds, and five more that were to confirm them.
        "long-resnet-quest-w2a2-inputs": long(
            quest_resnet, 4000, (rates[2], 3.16e-2, 0.1), num_seeds=8
        ),
        "long-resnet-identity": timed(long(resnet, 4000, (*rates, 3.16e-2), kept)),
        "long-resnet-tanh": long(replace(resnet, quantizer=TANH), 4000, (*rates[1:], 3.16e-2)),
        "long-resnet-lsq-w2": long(
            replace(resnet, quantizer=LSQ),
            4000,
            (*rates[1:], 3.16e-2),
            (
                *WIDE_ROWS,
                "ste-dampening-published",
                "ste-stable-qat",
                "ste-bbq",
                "parq",
                "ste-cage",
                "ste-winq",
                "ste-dampening",
            ),
        ),
        "long-resnet-quest-w2a2": long(quest_resnet, 4000, (*rates[1:], 3.16e-2)),
    }


def timed(config: CompareConfig) -> CompareConfig:
    """For the time of STE, too, which is half of FOGZO's."""
    return replace(config, equal_time=True, time_of="ste")


def long(
    base: TrainConfig,
    steps: int,
    rates: tuple[float, ...],
    rows: tuple[str, ...] = CORE_ROWS,
    num_seeds: int = 5,
) -> CompareConfig:
    """FOGZO with the defaults, at equal steps, masks recorded."""
    data = base.data
    if isinstance(data, TextConfig):
        data = replace(data, max_eval_blocks=512)
    every: dict[str, Any] = {"log_every": 100, "inspect_every": steps // 12}
    recipe = replace(base, data=data, max_steps=steps, agreement="shrunk", **every)
    return CompareConfig(
        base=recipe,
        rows=rows,
        learning_rates=rates,
        num_seeds=num_seeds,
        tuning_seeds=2,
        equal_time=False,
    )


def main() -> None:
    """Run or plan what is named."""
    known = comparisons()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mix-versions", action="store_true", help="as of `fogzo compare`")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        sys.exit(f"no comparison {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    for name in options.names or known:
        config = replace(known[name], workers=options.workers, mix_versions=options.mix_versions)
        if options.plan:
            display.compare_plan(plan(config))
            continue
        with display.progress(1, name) as advance:
            results = compare(config, lambda done, total: advance(done, total, "runs"))
        display.compare_results(results, write_compare_report(config, results))


if __name__ == "__main__":
    main()
