"""Training steps of one network, each as a function to time."""

from collections.abc import Callable

# Most programs have it loaded, and its stream, which probes give back, costs time.
import numpy.random  # noqa: F401
import torch
from torch import Tensor

from fogzo.estimators import GradientEstimator
from fogzo_lab.bench.networks import Network


class Steps:
    """The kinds of steps, of one network with one optimizer.

    Args:
        network: What is trained.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        # So small a learning rate that the network does not change while it is measured.
        self._optimizer = torch.optim.AdamW(network.model.parameters(), lr=1e-8)

    def ste(self) -> None:
        """A plain step: forward, backward, optimizer."""
        self._backward()
        self._optimizer.step()

    def forwards(self, count: int = 2) -> None:
        """Forward passes without gradients."""
        with torch.no_grad():
            for _ in range(count):
                self.network.loss()

    def floor(self, count: int = 2) -> None:
        """The least that a step with so many more forward passes can cost."""
        self._backward()
        self.forwards(count)
        self._optimizer.step()

    def refined(
        self, estimator: GradientEstimator, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """A step whose gradient an estimator refines.

        Args:
            estimator: Of this network's weights.
            closure: The probes' loss, by default the network's own.
        """
        loss = self._backward()
        expected = loss if estimator.one_sided else None
        estimator.refine_grads_(closure or self.network.loss, expected_loss=expected)
        self._optimizer.step()

    def forget_gradients(self) -> None:
        """Free them, so that measurements of memory begin alike."""
        self._optimizer.zero_grad()

    def _backward(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self.network.loss()
        loss.backward()
        return loss
