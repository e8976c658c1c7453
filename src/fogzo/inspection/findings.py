"""From numbers to findings: what is wrong, by which number, and what to try.

The thresholds are those of `THRESHOLDS`. Each lies between what healthy and sick runs show in
``experiments/doctor``; docs/doctor.md has both.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fogzo.inspection.records import Finding, Inspection, LayerInspection, percent
from fogzo.wording import alternatives

THRESHOLDS = {
    "learning_rate": 0.1,
    "masked": 0.1,
    "outgrown": 1.5,
    "dead": 0.2,
    "oscillating": 0.005,
    "undone": 0.6,
    "levels": 0.5,
    "clipped": 0.25,
    "fp16": 1e-3,
    "in_float": 0.5,
    "still": 0.01,
}
"""By kind of finding, the number from which it is reported:

- ``learning_rate``: mean distance by which weights move per step, over the range of levels
- ``masked``: share of weights that are masked and do not move
- ``outgrown``: the step size that would be measured now over the one that is kept
- ``dead``: share of output channels; of empty ones any
- ``oscillating``: flips per step over the number of levels, and ``undone``: the share of these that
  undo the last one
- ``levels``: bits of the codes' entropy over bits of the grid, below which it is reported, up to 16
  levels
- ``clipped``: share of input values
- ``fp16``: relative rounding error of a step size
- ``in_float``: share of the matrix weights outside embeddings and heads
- ``still``: changes per code in the run so far, had all steps flipped as many as the one with most,
  below which it is reported, from the second inspection on and not while weights move ever faster
"""

# An agreement that is not known better than this says nothing.
_KNOWN = 0.1
_SURE = 3.0  # standard errors
# A linear warm-up moves weights so much farther in each of its first five inspections.
_FASTER = 1.2


def diagnose(history: Sequence[Inspection]) -> list[Finding]:
    """What the inspections of a run say, the gravest first; empty where nothing is wrong.

    Masks, dead channels, levels, step sizes and clipped inputs are those of the last inspection. If
    numbers in it are not finite, that is said, and of the rest only what may have caused it.
    Flips count in the last quarter of those that counted any, where a healthy run has settled; the
    learning rate is judged by the inspection in which weights moved farthest.

    Args:
        history: Inspections of one model, in order; one is enough.
    """
    if not history:
        return []
    last = history[-1]
    counted = [i for i in history if i.mean("flips") is not None and not i.float_phase]
    broken = _not_finite(last)
    if broken is not None:
        return [finding for finding in (broken, _learning_rate(counted)) if finding is not None]
    if last.float_phase:
        return [_float_phase()]
    too_fast = _learning_rate(counted)
    # Whatever moves so far flips, or is out of reach of any level.
    settles = [] if too_fast is not None else [_oscillating(counted)]
    # What the float phase has trained, flips after it do not show.
    if too_fast is None and not any(inspection.float_phase for inspection in history):
        settles.append(_still(counted))
    found = [
        too_fast,
        _masked(_last_counted(last, counted)),
        _outgrown(last),
        _dead(last),
        *settles,
        _levels(last),
        _clipped(last),
        _fp16(last),
        _in_float(last),
        _agreement(last),
    ]
    return [finding for finding in found if finding is not None]


def agreement_note(agreement: float, error: float, masked: float) -> Finding | None:
    """What a mean agreement of a whole network says of FOGZO; None if it is not known well.

    Args:
        agreement: Mean over layers or steps.
        error: Its standard error.
        masked: Share of the weights that is masked.
    """
    if error > _KNOWN:
        return None
    said = f"agreement {agreement:.2f} ± {error:.2f}"
    if abs(agreement - 1) > _SURE * error:
        return Finding(
            kind="agreement",
            severity="note",
            layers=(),
            message=f"{said}: STE's gradient does not predict how the quantized loss changes, "
            "which FOGZO measures",
            code="fogzo.FogzoEstimator(fogzo.quantized_weights(model)), against its placebo",
            options="--estimator fogzo",
        )
    if masked > 0.01:
        return None
    return Finding(
        kind="agreement",
        severity="note",
        layers=(),
        message=f"FOGZO cannot help here: {said} and {_nothing_or(masked)} masked",
        code="plain STE, and the learning rate, the step sizes or more bits instead",
        options="--estimator ste",
    )


def _nothing_or(share: float) -> str:
    return percent(share) if share else "nothing"


def _last_counted(last: Inspection, counted: Sequence[Inspection]) -> Inspection:
    """The last inspection in which it was seen what moves, or the last."""
    return last if last.mean("frozen") is not None or not counted else counted[-1]


def _not_finite(inspection: Inspection) -> Finding | None:
    broken = [layer for layer in inspection.layers if layer.not_finite]
    layers = _beyond(broken, lambda layer: layer.not_finite, 0.0)
    if not layers:
        return None
    return Finding(
        kind="not_finite",
        severity="high",
        layers=layers,
        message=f"weights or step sizes are not finite: {_each(layers)} (any is reported)",
        code="model.load_state_dict(earlier) with weights from before training diverged, then a "
        "smaller learning rate or torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
        options="--learning-rate, smaller, or --clip-norm 1",
    )


def _learning_rate(counted: Sequence[Inspection]) -> Finding | None:
    def moved(layer: LayerInspection) -> float:
        return (layer.moved or 0.0) / layer.levels

    worst: dict[str, LayerInspection] = {}
    for layer in (layer for inspection in counted for layer in inspection.layers):
        if layer.name not in worst or moved(layer) > moved(worst[layer.name]):
            worst[layer.name] = layer
    layers = _beyond(worst.values(), moved, THRESHOLDS["learning_rate"])
    if not layers:
        return None
    times = layers[0][1] / THRESHOLDS["learning_rate"]
    said = [f"{share:.2g} of the range of levels in {name!r}" for name, share in layers[:2]]
    return Finding(
        kind="learning_rate",
        severity="high",
        layers=layers,
        message="the learning rate is too large: per step weights move by "
        f"{', '.join(said)} ({THRESHOLDS['learning_rate']} or more is reported)",
        code=f"a learning rate {max(2, math.ceil(times))} times smaller or less",
        options=f"--learning-rate, {max(2, math.ceil(times))} times smaller or less",
    )


def _masked(inspection: Inspection) -> Finding | None:
    layers = _beyond(inspection.layers, lambda layer: layer.stuck, THRESHOLDS["masked"])
    if not layers:
        return None
    named = {layer.name: layer for layer in inspection.layers}
    masked = [named[name] for name, _ in layers]
    code, options = "", ""
    if not all(layer.scale == "learned" for layer in masked):
        # The command's lsq has 2 bits, where a preset without any is left for it.
        binary = all(layer.levels == 2 for layer in masked)
        code = f", or fogzo.lsq({1 if binary else 'bits'})"
        options = f", or --quantizer.preset lsq{' --quantizer.bits 1' if binary else ''}"
    return Finding(
        kind="masked",
        severity="high",
        layers=layers,
        message=f"weights are masked and frozen: {_each(layers)} "
        f"({THRESHOLDS['masked']:.0%} or more is reported)",
        code=f'surrogate="identity_unmasked"{code}',
        options=f"--quantizer.surrogate identity_unmasked{options}",
    )


def _outgrown(inspection: Inspection) -> Finding | None:
    def times(layer: LayerInspection) -> float:
        return layer.outgrown or 0.0

    layers = _beyond(inspection.layers, times, THRESHOLDS["outgrown"])
    if not layers:
        return None
    said = [f"{ratio:.2g} times in {name!r}" for name, ratio in layers[:3]]
    return Finding(
        kind="outgrown",
        severity="high",
        layers=layers,
        message="weights have outgrown the step sizes that are kept: measured now, these would be "
        f"larger, {', '.join(said)}{_more(layers)} ({THRESHOLDS['outgrown']} times or more is "
        "reported)",
        code="fogzo.methods.quantize_from(model, 0.5, total_steps=steps), which measures them on "
        "trained weights unless a step_size was given, or fogzo.lsq(bits), which learns them",
        options="--quantize-from 0.5, or --quantizer.preset lsq",
    )


def _dead(inspection: Inspection) -> Finding | None:
    dead = [n for n in inspection.layers if n.empty or n.dead >= THRESHOLDS["dead"]]
    layers = _beyond(dead, lambda layer: layer.dead, 0.0)
    if not layers:
        return None
    return Finding(
        kind="dead",
        severity="medium",
        layers=layers,
        message=f"output channels are dead, without gradient or all zero: {_each(layers)} "
        f"({THRESHOLDS['dead']:.0%} without gradient, or any that is zero, is reported)",
        code="a smaller learning rate, a longer warm-up or another initialization; remove channels "
        'that were pruned, or keep them zero with levels="integer"',
        options="--learning-rate, smaller, or --warmup-fraction 0.1",
    )


def _oscillating(counted: Sequence[Inspection]) -> Finding | None:
    late = counted[-max(1, len(counted) // 4) :]
    if not late:
        return None
    layers, undone = [], {}
    for number, layer in enumerate(late[-1].layers):
        same = [inspection.layers[number] for inspection in late]
        flips = math.fsum(layer.flips or 0.0 for layer in same) / len(same)
        back = math.fsum((layer.flips or 0.0) * (layer.flips_back or 0.0) for layer in same)
        share = back / len(same) / flips if flips else 0.0
        if flips / layer.levels >= THRESHOLDS["oscillating"] and share >= THRESHOLDS["undone"]:
            layers.append((layer.name, flips))
            undone[layer.name] = share
    if not layers:
        return None
    layers.sort(key=lambda pair: -pair[1])
    worst = layers[0][0]
    pulls = ""
    if all(layer.evenly_spaced for layer in late[-1].layers):
        pulls = "fogzo.methods.dampening(model, total_steps=steps), fogzo.methods.cage(model, "
        pulls += "optimizer, total_steps=steps), or "
    return Finding(
        kind="oscillating",
        severity="high",
        layers=layers,
        message=f"codes oscillate: {_each(layers)} of them flip per step, and "
        f"{percent(undone[worst])} of the flips of {worst!r} undo the last one (flips of "
        f"{THRESHOLDS['oscillating']:.1%} of the number of levels, {THRESHOLDS['undone']:.0%} "
        "of them undone, or more is reported)",
        code=f"{pulls}a learning rate that decays to zero",
        options="--schedule cosine --final-fraction 0",
    )


def _still(counted: Sequence[Inspection]) -> Finding | None:
    trained = [replace(i, layers=[layer for layer in i.layers if layer.trained]) for i in counted]
    if not all(i.layers for i in trained):
        return None  # a base under adapters
    if len(trained) < 2 or _speeds_up(*trained[-2:]):
        return None
    changes = max((i.mean("flips") or 0.0) * (i.step or i.counted) for i in trained)
    if changes >= THRESHOLDS["still"]:
        return None
    return Finding(
        kind="still",
        severity="high",
        layers=(),
        message=f"the quantized network does not train: {percent(changes)} of its codes have "
        f"changed so far, at most (less than {THRESHOLDS['still']:.0%} is reported)",
        code="a larger learning rate; an optimizer made after fogzo.quantize_, which holds "
        "weights that require gradients",
        options="--learning-rate, larger",
    )


def _speeds_up(before: Inspection, last: Inspection) -> bool:
    """Whether weights move farther per step than they did, as early in a warm-up."""
    return (last.mean("moved") or 0.0) > _FASTER * (before.mean("moved") or 0.0)


def _levels(inspection: Inspection) -> Finding | None:
    # On finer grids no level is missed: LSQ's own start uses a tenth of 8 bits.
    coarse = [layer for layer in inspection.layers if layer.levels <= 16]
    few = [layer for layer in coarse if layer.bits_used < THRESHOLDS["levels"]]
    few.sort(key=lambda layer: layer.bits_used)
    if not few:
        return None
    said = [f"{layer.name!r} {layer.levels_used:.2g} of {layer.levels}" for layer in few[:3]]
    code, options = [], []
    if all(layer.levels == 2 for layer in few):  # no step size changes a sign
        code.append("a smaller learning rate or another initialization, for weights of both signs")
        options.append("--learning-rate, smaller")
    else:
        if not all(layer.scale == "learned" for layer in few):
            code.append("learned step sizes, fogzo.lsq(bits)")
            options.append("--quantizer.preset lsq")
        if any(layer.one_step for layer in few):
            code.append('granularity="channel"')
            options.append("--quantizer.granularity channel")
        code.append("fewer bits")
    return Finding(
        kind="levels",
        severity="medium",
        layers=[(layer.name, layer.levels_used) for layer in few],
        message=f"levels are wasted: the codes carry as much as so many equally frequent ones: "
        f"{', '.join(said)}{_more(few)} (less than half of the bits is reported)",
        code=alternatives(code),
        options=alternatives(options or ["--quantizer.bits, fewer"]),
    )


def _clipped(inspection: Inspection) -> Finding | None:
    layers = _beyond(inspection.layers, lambda layer: layer.clipped or 0.0, THRESHOLDS["clipped"])
    if not layers:
        return None
    named = {layer.name: layer for layer in inspection.layers}
    learned = all(named[name].input_scale == "learned" for name, _ in layers)
    return Finding(
        kind="clipped",
        severity="medium",
        layers=layers,
        message=f"inputs are clipped: {_each(layers)} of their values lie beyond the last level "
        f"({THRESHOLDS['clipped']:.0%} or more is reported)",
        code="with fogzo.calibrate_(model): model(x) on typical inputs, or step sizes that are "
        + ("" if learned else "learned or ")
        + "measured anew, activations="
        + ("" if learned else "fogzo.lsq(bits) or ")
        + "fogzo.abs_max(bits)",
        options=f"--activations.preset {'' if learned else 'lsq, or '}abs_max",
    )


def _fp16(inspection: Inspection) -> Finding | None:
    layers = _beyond(inspection.layers, lambda layer: layer.fp16_error, THRESHOLDS["fp16"])
    if not layers:
        return None
    return Finding(
        kind="fp16",
        severity="medium",
        layers=layers,
        message="step sizes are outside the normal range of float16, in which gguf holds them, and "
        f"change when they are exported there: {_each(layers)} "
        f"({THRESHOLDS['fp16']:.1%} or more is reported)",
        code='fogzo.export.export(model, folder, "packed"), or "onnx", which hold them in float32; '
        "or weights of more usual size, with the factor behind the layer",
    )


def _in_float(inspection: Inspection) -> Finding | None:
    left = [item for item in inspection.in_float if item.reason is not None]
    size = sum(item.weights for item in left)
    total = size + sum(layer.weights for layer in inspection.layers)
    if size < THRESHOLDS["in_float"] * total:
        return None
    named = ", ".join(f"{item.name} ({item.reason})" for item in left[:2])
    selectable = 2 * sum(item.weights for item in left if item.selectable) >= size
    return Finding(
        kind="in_float",
        severity="medium",
        layers=[(item.name, item.weights / total) for item in left],
        message=f"{percent(size / total)} of the matrix weights outside embeddings and heads stay "
        f"in float: {named}{_more(left, 2)} ({THRESHOLDS['in_float']:.0%} or more is "
        "reported)",
        code="fogzo.quantize_(model, quantizer, filter_fn=lambda module, name: True)"
        if selectable
        else "layers that the model calls in their place, an nn.Linear for each projection",
        options="--quantize-first --quantize-last" if selectable else None,
    )


def _agreement(inspection: Inspection) -> Finding | None:
    known = [
        (layer.agreement, layer.agreement_error)
        for layer in inspection.layers
        if layer.agreement is not None and layer.agreement_error
    ]
    weight = math.fsum((1 / error) ** 2 for _, error in known)
    if not weight:
        return None  # none was measured, or as good as none
    mean = math.fsum(agreement * (1 / error) ** 2 for agreement, error in known) / weight
    return agreement_note(mean, 1 / math.sqrt(weight), inspection.mean("masked") or 0.0)


def _float_phase() -> Finding:
    return Finding(
        kind="float_phase",
        severity="note",
        layers=(),
        message="the layers compute in float until quantization begins, so codes say nothing yet",
        code="switch.advance_() of fogzo.methods.quantize_from after each optimizer step",
    )


def _beyond(
    layers: Iterable[LayerInspection],
    number: Callable[[LayerInspection], float],
    threshold: float,
) -> list[tuple[str, float]]:
    """The layers whose number is the threshold or more, worst first."""
    found = [(layer.name, number(layer)) for layer in layers]
    return sorted((pair for pair in found if pair[1] >= threshold), key=lambda pair: -pair[1])


def _each(layers: Sequence[tuple[str, float]], most: int = 3) -> str:
    said = ", ".join(f"{percent(value)} of {name!r}" for name, value in layers[:most])
    return f"{said}{_more(layers, most)}"


def _more(items: Sequence[object], most: int = 3) -> str:
    return "" if len(items) <= most else f" and {len(items) - most} more"
