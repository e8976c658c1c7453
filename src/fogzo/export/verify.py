"""What a format's reader makes of the files, compared with the model that was exported."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fogzo.probing.rng import RngState


@dataclass(frozen=True)
class ReadBack:
    """An exported model, as its reader sees it.

    Attributes:
        reader: Which one, as the report calls it.
        weights: The quantized layers' weights by name, in float and in their own shapes.
        call: What the read model answers to an example; None where the reader runs no model.
    """

    reader: str
    weights: Mapping[str, Tensor]
    call: Callable[[Any], Tensor] | None = None


def answer(model: nn.Module, example: Any) -> Tensor:
    """The output of a model in eval mode; where it has several, its logits or the first.

    Args:
        model: Its modes are left as they were.
        example: A tensor, a tuple of positional arguments or a dict of keywords.
    """
    return _logits_in(_output(model, example))


def place_of_answer(model: nn.Module, example: Any) -> int:
    """At which place among all tensors that a model returns its `answer` is."""
    output = _output(model, example)
    found = _logits_in(output)
    tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return next((place for place, tensor in enumerate(tensors) if tensor is found), 0)


def _output(model: nn.Module, example: Any) -> Any:
    modes = {module: module.training for module in model.modules()}
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if held is None else held.device
    if held is not None:  # a reader may load what a GPU trained on the CPU
        example = _moved(example, device)
    model.eval()
    try:
        with torch.no_grad(), _same_draws(device):
            if isinstance(example, Mapping):
                return model(**example)
            return model(*example) if isinstance(example, tuple | list) else model(example)
    finally:
        for module, training in modes.items():
            module.training = training


def _logits_in(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):  # also what transformers' models without a head return
        found = found["logits"] if "logits" in found else next(iter(found.values()), None)
    if isinstance(found, tuple | list):
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model answers with {type(output).__name__}, expected a tensor, or an object or "
            "dict with logits: wrap it in a module that returns them"
        )
    return found


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Lend the random streams in one state: some draw in eval mode, too, as ViTMAE its masks."""
    streams = RngState([device])
    try:
        torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        if device.type != "cpu":
            state = torch.Generator(device).manual_seed(0).get_state()
            torch.get_device_module(device).set_rng_state(state, device)
        yield
    finally:
        streams.restore()


def trained_answer(model: nn.Module, example: Any) -> Tensor:
    """The `answer` of the model that is exported.

    Raises:
        ValueError: If it does not take the example.
    """
    try:
        return answer(model, example)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the model does not answer to the example ({what:.300}): example=x, if model(x) is "
            "how it is called, a tuple of arguments or a dict of keywords"
        ) from error


def _moved(example: Any, device: torch.device) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, Mapping):
        return {name: _moved(value, device) for name, value in example.items()}
    if isinstance(example, tuple | list):
        return [_moved(value, device) for value in example]
    return example


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; 0 only where all are equal."""
    if found.shape != expected.shape:
        return torch.inf
    wide = expected.detach().double().cpu()
    gap = (found.detach().double().cpu() - wide).abs().max().item()
    return gap / max(wide.abs().max().item(), torch.finfo(torch.float64).tiny)


def example_of(model: nn.Module) -> Any:
    """An input that a model of transformers takes; None where nothing tells what it would be."""
    try:
        example = _made_up(model)
        if example is not None:
            answer(model, example)
    except Exception:  # it takes something else, of which its config says nothing
        return None
    return example


def _made_up(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters())
    if main == "input_ids" and hasattr(config, "vocab_size"):
        length = min(16, getattr(config, "max_position_embeddings", 16))
        tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
        tokens = tokens.to(parameter.device)
        if "decoder_input_ids" in inspect.signature(model.forward).parameters:
            return {"input_ids": tokens, "decoder_input_ids": tokens}
        return tokens
    if main == "pixel_values" and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(1, config.num_channels, height, width, generator=generator)
        return images.to(parameter.device, parameter.dtype)
    return None
