"""An oracle: a regression with quantized weights, simulated and, without any fit, predicted.

setting = Regression(omega=2.0, learning_rate=0.1)
regression_dynamics(setting, times=[0, 10, 20]).risk
simulate(setting, times=[0, 10, 20], weights=1000, seed=0).risk
"""

from fogzo_lab.dynamics.closure import gaussian_closure
from fogzo_lab.dynamics.curve import Curve, Density
from fogzo_lab.dynamics.density import regression_dynamics
from fogzo_lab.dynamics.setting import Regression
from fogzo_lab.dynamics.simulation import batches, simulate

__all__ = [
    "Curve",
    "Density",
    "Regression",
    "batches",
    "gaussian_closure",
    "regression_dynamics",
    "simulate",
]
