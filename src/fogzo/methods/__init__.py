"""Ways to train through a quantizer beside the gradient estimators, each a line or two of a loop.

pull = fogzo.methods.cage(model, optimizer, total_steps=10_000)
...
optimizer.step()
pull.pull_()
"""

from fogzo.methods.cewt import Cewt, cewt, project_to_gaussian
from fogzo.methods.forgetting import ForgetReport, forget_
from fogzo.methods.phases import Switch, quantize_from
from fogzo.methods.project import project_
from fogzo.methods.pull import GridPenalty, GridPull, cage, dampening, winq

__all__ = [
    "Cewt",
    "ForgetReport",
    "GridPenalty",
    "GridPull",
    "Switch",
    "cage",
    "cewt",
    "dampening",
    "forget_",
    "project_",
    "project_to_gaussian",
    "quantize_from",
    "winq",
]
