r"""The paper's algorithm on one page, in the paper's symbols. The oracle for everything faster.

Yang & Aamodt, "First-order-guided zeroth-order gradient descent", arXiv 2510.23926:

    v_i = sqrt(beta) s_i ghat + sqrt(1 - beta) u_i
    G   = 1/n sum_i [L(theta + eps v_i) - L(theta - eps v_i)] / (2 eps) v_i

with a fair coin s_i, u_i of independent zero-mean unit-variance entries by the surrogate's
smoothing law, and eps = alpha * eps_bar for step size alpha. The paper writes one eps. With one
per weight, all of it takes place in phi = theta / eps, where L(phi) has gradient eps * g; the
result goes back as G_theta = G_phi / eps. With equal eps the two coincide.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def fogzo_gradient(
    L: Callable[[Sequence[Tensor]], Tensor],
    theta: Sequence[Tensor],
    g: Sequence[Tensor],
    eps: Sequence[Tensor],
    q: float,
    s: Sequence[float],
    u: Sequence[Sequence[Tensor]],
) -> list[Tensor]:
    """FOGZO's gradient with respect to theta.

    Args:
        L: The hard-quantized loss of a list of latent weights, a scalar.
        theta: Latent weights.
        g: Their straight-through gradients.
        eps: Perturbation radii alpha * eps_bar, each broadcastable to its weight.
        q: 1 - beta, kept instead of beta because float32 holds no 1 - 1e-9.
        s: n signs.
        u: n draws, each one tensor per weight.
    """
    n = len(s)
    g_phi = [e * gt for e, gt in zip(eps, g, strict=True)]
    N = torch.stack([gt.double().square().sum() for gt in g_phi]).sum().sqrt()
    ghat = [gt / N for gt in g_phi]
    G_phi = [torch.zeros_like(gt) for gt in g_phi]
    for s_i, u_i in zip(s, u, strict=True):
        v = [(1 - q) ** 0.5 * s_i * gh + q**0.5 * ut for gh, ut in zip(ghat, u_i, strict=True)]
        plus = L([t + e * vt for t, e, vt in zip(theta, eps, v, strict=True)])
        minus = L([t - e * vt for t, e, vt in zip(theta, eps, v, strict=True)])
        delta = (plus - minus) / 2
        G_phi = [G + delta * vt / n for G, vt in zip(G_phi, v, strict=True)]
    return [G / e for G, e in zip(G_phi, eps, strict=True)]
