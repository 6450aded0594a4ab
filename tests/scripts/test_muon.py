"""Muon against the singular value decomposition that it approximates."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).parents[2] / "scripts" / "_muon.py"


@pytest.fixture(scope="module")
def muon() -> ModuleType:
    spec = importlib.util.spec_from_file_location("muon", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matrix(rows: int, columns: int, smallest: float, seed: int = 0) -> Tensor:
    """Singular values from 1 down to `smallest`, evenly on a log scale."""
    g = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(size, n, generator=g))[0] for size in (rows, columns))
    return u @ torch.diag(torch.logspace(0, torch.tensor(smallest).log10().item(), n)) @ v.T


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (12, 12)])
def test_every_direction_becomes_about_as_long(muon: ModuleType, shape: tuple[int, int]) -> None:
    several = torch.stack([matrix(*shape, 0.02, seed) for seed in range(3)])
    for before, after in zip(several, muon.orthogonalised(5.0 * several)):
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ v.T                       # diagonal, if the singular vectors are the same
        values = inner.diagonal()
        # five steps of the quintic leave what was above 1 % of the norm between 0.65 and 1.25 (its published range)
        assert values.min() > 0.65
        assert values.max() < 1.25
        # float32 products of Grams whose condition is 0.02^-2, a few thousand roundings
        torch.testing.assert_close(inner - values.diag(), torch.zeros_like(inner), rtol=0, atol=5e-3)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_the_iteration_is_the_published_one(muon: ModuleType, shape: tuple[int, int]) -> None:
    """X <- a X + b X X^T X + c (X X^T)^2 X, five times over, with the published a, b and c."""
    g = matrix(*shape, 0.1)
    x = g.double() / g.double().norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    # float32 products of Grams, a few thousand roundings
    torch.testing.assert_close(muon.orthogonalised(g[None])[0].double(), x, rtol=0, atol=1e-3)


def test_a_step_has_the_length_that_is_promised(muon: ModuleType) -> None:
    """From nothing, Nesterov's momentum is a multiple of the gradient, so one step is lr * 0.2 sqrt(max) * U V^T."""
    gradient = matrix(6, 18, 0.3)
    weight = torch.nn.Parameter(torch.zeros(6, 2, 3, 3))
    weight.grad = gradient.reshape(6, 2, 3, 3).clone()
    muon.Muon([weight], lr=0.1, weight_decay=0.5).step()
    expected = -0.1 * 0.2 * 18**0.5 * muon.orthogonalised(gradient[None])[0]
    torch.testing.assert_close(weight.detach().flatten(1), expected, rtol=1e-4, atol=1e-6)   # float32
    assert 0.65 < weight.detach().square().mean().sqrt().item() / (0.1 * 0.2) < 1.25         # as AdamW's usually are


def test_weights_decay_apart_from_the_gradient(muon: ModuleType) -> None:
    weight, still = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    muon.Muon([weight, still], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 0.95), rtol=1e-6, atol=0)     # float32
    assert torch.equal(still.detach(), torch.ones(3, 4))     # no gradient, no step


def test_the_momentum_is_a_moving_average_looked_at_ahead(muon: ModuleType) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = muon.Muon([weight], lr=1.0, momentum=0.9)
    first, second = matrix(2, 3, 0.5), matrix(2, 3, 0.5, seed=1)
    mean = 0.1 * first
    weight.grad = first.clone()
    optimizer.step()
    weight.grad, mean = second.clone(), 0.9 * mean + 0.1 * second
    before = weight.detach().clone()
    optimizer.step()
    ahead = 0.1 * second + 0.9 * mean
    step = 0.99 * before - 0.2 * 3**0.5 * muon.orthogonalised(ahead[None])[0]
    torch.testing.assert_close(weight.detach(), step, rtol=1e-4, atol=1e-6)  # float32, orthogonalised in five products
