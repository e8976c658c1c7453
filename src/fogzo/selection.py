"""Which layers can be quantized, and which are when nobody says so."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

FilterFn = Callable[[nn.Module, str], bool]

_HEAD_NAMES = {"lm_head", "classifier", "head", "fc", "score", "qa_outputs", "embed_out"}


def output_dim(module: nn.Module) -> int | None:
    """Which dimension of a layer's weight holds its output channels; None if unsupported."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads its weight without calling its forward
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return 1
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
        return 0
    # transformers' Conv1D is a linear layer of transposed weight; known by name, as this package
    # must not import transformers.
    if any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    ):
        return 1
    return None


def select_layers(
    model: nn.Module, layers: dict[str, nn.Module], filter_fn: FilterFn | None
) -> dict[str, nn.Module]:
    """The layers to quantize, by name: those a filter picks, or all but embeddings and heads.

    Raises:
        ValueError: If that is none.
    """
    if filter_fn is None:
        heads = _output_heads(layers)
        selected = {
            name: layer
            for name, layer in layers.items()
            if not isinstance(layer, nn.Embedding) and layer not in heads
        }
    else:
        selected = {name: layer for name, layer in layers.items() if filter_fn(layer, name)}
    if selected:
        return selected
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that can be quantized: Linear, Conv1d/2d/3d, "
            "ConvTranspose1d/2d/3d, Embedding and transformers' Conv1D are"
        )
    rule = "the default filter leaves embeddings and output heads alone"
    raise ValueError(
        f"nothing was selected out of {', '.join(layers)} "
        f"({rule if filter_fn is None else 'filter_fn returned False for each'}): "
        "to quantize all of them, "
        "fogzo.quantize_(model, quantizer, filter_fn=lambda module, name: True)"
    )


def _output_heads(layers: dict[str, nn.Module]) -> list[nn.Module]:
    """The layers that turn features into predictions, which most recipes leave in float."""
    heads = [layer for name, layer in layers.items() if name.rpartition(".")[2] in _HEAD_NAMES]
    if not heads:
        heads += [layer for layer in layers.values() if isinstance(layer, nn.Linear)][-1:]
    embeddings = {id(m.weight) for m in layers.values() if isinstance(m, nn.Embedding)}
    return heads + [layer for layer in layers.values() if id(layer.weight) in embeddings]


def check_ties(
    layers: dict[str, nn.Module], selected: dict[str, nn.Module], one_step: bool
) -> None:
    """A tied weight must be quantized wherever it is used, or the uses would drift apart."""
    first: dict[int, str] = {}
    for name, layer in selected.items():
        other = first.setdefault(id(layer.weight), name)
        if output_dim(layer) != output_dim(selected[other]) and not one_step:
            raise ValueError(
                f"{name!r} and {other!r} share a weight but not which dimension is its output: "
                'use granularity="tensor" without rotation, for example '
                "fogzo.lsq(bits=2), or leave both out with filter_fn"
            )
    for name, layer in layers.items():
        if name in selected:
            continue
        for other, chosen in selected.items():
            if chosen.weight is layer.weight:
                raise ValueError(
                    f"{other!r} shares its weight with {name!r}, which is not selected: "
                    "let filter_fn return True for both, or for neither"
                )
