"""Muon: momentum whose update, for a matrix, is made orthogonal before it is taken (Jordan et al. 2024).

Adam scales every number of a weight for itself; a matrix's update then has a few strong directions, and the faint ones
are hardly learned. Muon gives all directions the same length: U V^T of the momentum's singular value decomposition,
approximately, by five steps of a Newton-Schulz iteration. A convolution counts as the matrix (out, in * 3 * 3).

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale that makes the
updates as long as AdamW's, so that one learning rate serves both: Liu et al. 2025 (arXiv:2502.16982), section 2.2.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# x -> a x + b x^3 + c x^5, five times over, brings what lies in (0.0015, 1] near 1, between 0.68 and 1.2; what is
# smaller becomes up to 485 times as much
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Replace the singular values of (k, n, m) float32 matrices by about 1, keeping their vectors: by 0.68 to 1.2 where
    they are 0.0015 of the matrix's norm or more.

    The polynomials act on the smaller square, X X^T, and on X once at the end: two products with X, not ten. The longer
    the matrix, the more that saves; a square one takes a quarter more multiplications so.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    gram, product = x @ x.transpose(1, 2), None                                                # (k, n, n)
    for left in range(ITERATIONS)[::-1]:
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        gram = polynomial @ gram @ polynomial if left else gram
    x = product @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.transpose(1, 2)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and decoupled weight decay, over float32 weights of two or more dimensions."""

    def __init__(
        self, weights: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Take a step down the gradients that there are. Matrices of one shape go together."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.flatten(1).shape].append(weight)
            for (rows, columns), weights in alike.items():
                update = torch.stack([self._momentum(weight, group["momentum"]) for weight in weights])
                length = 0.2 * max(rows, columns) ** 0.5        # a root mean square of 0.2, as AdamW's updates have
                for weight, step in zip(weights, orthogonalised(update)):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step.reshape(weight.shape), alpha=-group["lr"] * length)

    def _momentum(self, weight: Tensor, decay: float) -> Tensor:
        """The momentum after this gradient, looked at one step ahead, as a matrix."""
        mean = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        mean.lerp_(weight.grad, 1 - decay)
        return weight.grad.lerp(mean, decay).flatten(1)
