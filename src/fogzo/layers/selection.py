"""Which layers can be quantized, and which are when nobody says so."""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from fogzo.layers.experts import ExpertMatrices, fused_parameters
from fogzo.wording import caveat, listed

FilterFn = Callable[[nn.Module, str], bool]

# What PEFT adds to the name of a layer that it wraps.
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)$")
_HEAD_NAMES = {"lm_head", "classifier", "head", "fc", "score", "qa_outputs", "embed_out"}


def output_dim(module: nn.Module) -> int | None:
    """Which dimension of a layer's weight holds its output channels; None if unsupported."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads its weight without calling its forward
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return 1
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
        return 0
    if isinstance(module, ExpertMatrices):
        return 0  # as its quantizer puts the outputs of all experts in rows
    # transformers' Conv1D is a linear layer of transposed weight; known by name, as this package
    # must not import transformers.
    if any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    ):
        return 1
    return None


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The supported layers of a model, by name; none without weights, such as Linear(0, n)."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertMatrices):
            continue  # listed with the module that holds the weight
        if output_dim(module) is not None and _has_weights(module):
            layers[name] = module
        for matrices in fused_parameters(module):
            layers[f"{name}.{matrices.parameter}".lstrip(".")] = matrices
    return layers


def without_adapters(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers less those of adapters (LoRA and others of PEFT), which are small and in float."""
    inside = _adapters(model)
    return {name: layer for name, layer in layers.items() if not inside(name)}


def select_layers(
    model: nn.Module, layers: dict[str, nn.Module], filter_fn: FilterFn | None
) -> dict[str, nn.Module]:
    """The layers to quantize, by name: those a filter picks, or all but embeddings and heads.

    Raises:
        ValueError: If that is none, or the filter is no function of (module, name).
    """
    if filter_fn is None:
        heads = _output_heads(layers)
        selected = {
            name: layer
            for name, layer in layers.items()
            if not isinstance(layer, nn.Embedding) and name not in heads
        }
    else:
        _check_filter(filter_fn)
        selected = {name: layer for name, layer in layers.items() if filter_fn(layer, name)}
    if selected:
        return selected
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that can be quantized: Linear, Conv1d/2d/3d, "
            "ConvTranspose1d/2d/3d, Embedding, transformers' Conv1D and fused experts are"
        )
    names = (name or f"the model, a {type(layer).__name__}" for name, layer in layers.items())
    rule = "the default filter leaves embeddings and output heads alone"
    raise ValueError(
        f"nothing was selected out of {', '.join(names)} "
        f"({rule if filter_fn is None else 'filter_fn returned False for each'}): "
        "to quantize all of them, "
        "fogzo.quantize_(model, quantizer, filter_fn=lambda module, name: True)"
    )


def _check_filter(filter_fn: object) -> None:
    """Raise a `ValueError` unless it is a function of (module, name)."""
    found = f"{filter_fn!r:.80}"
    if callable(filter_fn) and not isinstance(filter_fn, type):
        try:
            signature = inspect.signature(filter_fn)
        except ValueError:  # some that are written in C do not tell
            return
        try:
            signature.bind(nn.Identity(), "name")
        except TypeError:
            found = f"one of {signature!s:.80}"
        else:
            return
    raise ValueError(
        "filter_fn must be a function of (module, name) that says which layers to quantize, got "
        f"{found}: fogzo.quantize_(model, quantizer, filter_fn=lambda module, name: "
        'name in {"layers.0", "layers.1"})'
    )


def _output_heads(layers: Mapping[str, nn.Module]) -> set[str]:
    """The layers that turn features into predictions, which most recipes leave in float."""
    heads = _heads_by_name(layers)
    if not heads:
        heads = set([name for name, layer in layers.items() if isinstance(layer, nn.Linear)][-1:])
    return heads | _tied_to_embeddings(layers)


def _heads_by_name(layers: Mapping[str, nn.Module]) -> set[str]:
    return {name for name in layers if _WRAPPED.sub("", name).rpartition(".")[2] in _HEAD_NAMES}


def _adapters(model: nn.Module) -> Callable[[str], bool]:
    """Whether a module of that name belongs to an adapter; known by the name of PEFT's class."""
    wrappers = [
        f"{name}."
        for name, module in model.named_modules()
        if any(
            cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.")
            for cls in type(module).__mro__
        )
    ]

    def inside(name: str) -> bool:
        return any(
            name.startswith(wrapper) and not f"{name}.".startswith(f"{wrapper}base_layer.")
            for wrapper in wrappers
        )

    return inside


def _tied_to_embeddings(layers: Mapping[str, nn.Module]) -> set[str]:
    """The embeddings, too."""
    embeddings = {_id(layer) for layer in layers.values() if isinstance(layer, nn.Embedding)}
    return {name for name, layer in layers.items() if _id(layer) in embeddings}


def _id(layer: nn.Module) -> int:
    # A weight that a parametrization computes is another tensor each time it is read.
    own = layer._parameters.get("weight")
    weight = layer.weight if isinstance(layer, ExpertMatrices) else own
    return id(layer if weight is None else weight)


def check_ties(
    model: nn.Module,
    layers: dict[str, nn.Module],
    selected: dict[str, nn.Module],
    one_step: bool,
) -> None:
    """A tied weight must be quantized wherever it is used, or the uses would drift apart.

    Raises:
        ValueError: If it is not, or its uses have no step sizes in common.
    """
    first: dict[int, str] = {}
    for name, layer in selected.items():
        other = first.setdefault(_id(layer), name)
        if output_dim(layer) != output_dim(selected[other]) and not one_step:
            raise ValueError(
                f"{name!r} and {other!r} share a weight but not which dimension is its output: "
                'use granularity="tensor" without rotation, for example '
                "fogzo.lsq(bits=2), or leave both out with filter_fn"
            )
    for name, layer in layers.items():
        if name not in selected and _id(layer) in first:
            raise ValueError(
                f"{first[_id(layer)]!r} shares its weight with {name!r}, which is not selected: "
                "let filter_fn return True for both, or for neither"
            )
    _check_other_holders(model, selected, first)


def _check_other_holders(
    model: nn.Module, selected: Mapping[str, nn.Module], first: Mapping[int, str]
) -> None:
    """Raise a `ValueError` if a module that is no selected layer holds the weight of one.

    Args:
        model: All of it.
        selected: The layers that will be quantized.
        first: The first of them that uses a weight, by the weight's identity.
    """
    own = {
        (id(layer.experts), layer.parameter)
        if isinstance(layer, ExpertMatrices)
        else (id(layer), "weight")
        for layer in selected.values()
    }
    for module_name, module in model.named_modules():
        for name, param in module._parameters.items():
            if id(param) in first and (id(module), name) not in own:
                raise ValueError(
                    f"{first[id(param)]!r} shares its weight with {name!r} of {module_name!r}, "
                    f"which would use it in float, as {type(module).__name__} is no layer that can "
                    "be quantized: leave the weight out with filter_fn, or untie it first, module "
                    f"= model.get_submodule({module_name!r}); module.{name} = "
                    f"torch.nn.Parameter(module.{name}.detach().clone())"
                )


def warn_of_selection(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    selected: Mapping[str, nn.Module],
    default: bool,
) -> None:
    """Warn of a selection that is hardly what was meant.

    Args:
        model: All of it, as weights may lie outside of supported layers.
        layers: The supported ones.
        selected: Those that will be quantized.
        default: Whether the default filter chose them.
    """
    doubtful = _warn_of_heads(layers, selected) if default else set()
    left = list(left_in_float(model, layers, selected, doubtful))
    sizes = {_id(layer): cast(Tensor, layer.weight).numel() for layer in selected.values()}
    quantized = sum(sizes.values())
    total = quantized + sum(item.size for item in left)
    attention = [item.name for item in left if item.reason == _ATTENTION]
    if default and quantized < total / 2:
        warnings.warn(
            f"only {quantized / total:.0%} of the matrix weights outside embeddings and heads are "
            f"quantized. The largest left in float: {_largest(left)}. To say which layers you "
            "mean: fogzo.quantize_(model, quantizer, filter_fn=lambda module, name: ...)"
            + caveat("Left in float"),
            UserWarning,
            stacklevel=3,
        )
    elif attention:
        warnings.warn(f"{listed(attention)} left in float: {_ATTENTION}", UserWarning, stacklevel=3)


class Left(NamedTuple):
    """A matrix that is not quantized, and why."""

    name: str
    size: int
    reason: str
    selectable: bool


_ATTENTION = "nn.MultiheadAttention uses its weights itself, without calling a layer"


def _largest(left: list[Left], most: int = 3) -> str:
    """The largest of the matrices, those that differ in a number alone together."""
    alike: dict[tuple[str, str], list[Left]] = {}
    for item in left:
        alike.setdefault((re.sub(r"\d+", "*", item.name), item.reason), []).append(item)
    groups = sorted(alike.values(), key=lambda group: -sum(item.size for item in group))
    return "; ".join(
        f"{group[0].name!r}{f' and {len(group) - 1} like it' if len(group) > 1 else ''} "
        f"({sum(item.size for item in group):,} weights), {group[0].reason}"
        for group in groups[:most]
    )


def left_in_float(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    selected: Mapping[str, nn.Module],
    doubtful: set[str],
) -> Iterator[Left]:
    """The matrices that stay in float, but for embeddings, heads and normalization."""
    meant = _output_heads(layers) - doubtful
    seen = {_id(layer) for name, layer in layers.items() if name in selected or name in meant}
    of_adapter = _adapters(model)
    for module_name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in kind.lower():
            continue
        if of_adapter(module_name):
            continue
        for name, param in module._parameters.items():
            if param is None or id(param) in seen or not _is_matrix(param) or "embed" in name:
                continue
            seen.add(id(param))
            full_name, selectable = f"{module_name}.{name}".lstrip("."), True
            if module_name in doubtful:
                reason = "taken for an output head by its name"
            elif isinstance(module, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
                reason, selectable = _ATTENTION, False
            elif module_name in layers or full_name in layers:
                reason = f"a {kind} that filter_fn did not pick"
            else:
                reason = f"a parameter of {kind}, which is no layer that can be quantized"
                selectable = False
            yield Left(full_name, param.numel(), reason, selectable)


def _warn_of_heads(layers: Mapping[str, nn.Module], selected: Mapping[str, nn.Module]) -> set[str]:
    """Warn if the last layer is quantized or others pass for heads; the names of the latter."""
    last = [name for name, layer in layers.items() if not isinstance(layer, nn.Embedding)][-1]
    doubtful = {
        name
        for name in _heads_by_name(layers) - _tied_to_embeddings(layers) - {last}
        # An auxiliary classifier in the middle predicts what the last one does.
        if last in selected or _outputs(layers[name]) != _outputs(layers[last])
    }
    if not doubtful and last not in selected:
        return doubtful
    names = [name for name in layers if name in doubtful]
    kept = f"{listed(names)} left in float as output heads, by their name, but " if names else ""
    fate = "quantized" if last in selected else "left in float, too"
    only = "the only" if names else "an"
    warnings.warn(
        f"{kept}{last!r}, which comes last, is {fate}. If it is {only} output head: "
        "fogzo.quantize_(model, quantizer, filter_fn=lambda module, name: "
        f"not isinstance(module, torch.nn.Embedding) and name != {last!r})",
        UserWarning,
        stacklevel=4,
    )
    return doubtful


def _outputs(layer: nn.Module) -> int | None:
    weight = cast(Tensor, layer.weight)
    lazy = isinstance(weight, UninitializedTensorMixin)
    return None if lazy else weight.shape[output_dim(layer) or 0]


def _is_matrix(param: nn.Parameter) -> bool:
    return not isinstance(param, UninitializedTensorMixin) and sum(n > 1 for n in param.shape) > 1


def _has_weights(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, UninitializedTensorMixin) or (
        isinstance(weight, Tensor) and weight.numel() > 0
    )
