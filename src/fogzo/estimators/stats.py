"""The report of one call of `refine_grads_`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RefineStats:
    """Plain numbers of one refined step; nothing here costs an extra forward pass.

    Attributes:
        step: Index of the step, from 0.
        agreement: lambda, the measured slope of the quantized loss along the first-order
            gradient over the slope that gradient predicts: 1 where STE is right, 0 where it is
            orthogonal to the loss, negative where it climbs. None without such a measurement.
        agreement_error: Its standard error where STE is right, from the number of codes that can
            change and the rounding of the loss, and where inputs are quantized, too, from how far
            the loss lies off the middle of a probe's losses, or agreements of two steps lie apart.
            An agreement within it of 1 says nothing against STE.
        applied_agreement: The factor that the first-order gradient was given: the agreement, drawn
            towards 1 by its error, or beta times it with ``agreement="measured"``.
        noise_share: q = 1 - beta of this step; None where the gradient was left alone and for
            estimators without a guide or without its share.
        kappa: Noise-to-signal power ``q d / (n beta)``, or None likewise.
        probe_losses: The 2n losses in the order of evaluation, ``L1+, L1-, L2+, ...``; if
            one-sided the n losses ``L1+, L2+, ...``.
        base_loss: The loss at the weights themselves that one-sided differences start from.
        gradient_norm: N, the norm of the first-order gradient in scale-normalised coordinates;
            None for estimators that use none.
        fallback: Why the first-order gradient was kept, or None.
    """

    step: int
    agreement: float | None = None
    agreement_error: float | None = None
    applied_agreement: float | None = None
    noise_share: float | None = None
    kappa: float | None = None
    probe_losses: tuple[float, ...] = ()
    base_loss: float | None = None
    gradient_norm: float | None = None
    fallback: str | None = None

    @property
    def loss_gap(self) -> float | None:
        """Mean ``|L+ - L-|`` over samples, in the loss's units; None without probes.

        One-sided it is twice the mean ``|L+ - L|``, which is the same size.
        """
        if not self.probe_losses:
            return None
        if self.base_loss is not None:
            gaps = [abs(loss - self.base_loss) for loss in self.probe_losses]
            return 2 * sum(gaps) / len(gaps)
        plus, minus = self.probe_losses[::2], self.probe_losses[1::2]
        return sum(abs(p - m) for p, m in zip(plus, minus, strict=True)) / len(plus)
