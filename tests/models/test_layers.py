"""Closed forms of the small parts."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import checkpointing, layers, products, residual
from models.attention import ImageAttention, JointAttention, SpatialTransformer
from models.condition import Condition
from models.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    NormSiLU,
    Pointwise,
    Upsample,
    conv3x3,
    conv_of_doubled,
    conv_plus,
    half,
    norm_conv,
    plus,
    timestep_embedding,
    twice,
    zero,
)  # fmt: skip
from models.transformer import GEGLU
from models.unet import ResBlock, UNet, UNetConfig
from models.vae import Downsample, VAEConfig
from tests.tiny import tiny_model


def test_time_embedding_is_cosines_then_sines_divided_by_half() -> None:
    emb = timestep_embedding(torch.tensor([0, 10, 999]), 8)
    for row, t in zip(emb.tolist(), (0, 10, 999)):
        angles = [t * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # angles up to 999 carry a float32 rounding of 6e-5 at the most
        assert torch.allclose(torch.tensor(row), torch.tensor(expected), atol=1e-4)
    assert emb.dtype == torch.float32


def test_an_odd_width_ends_in_zero() -> None:
    assert timestep_embedding(torch.tensor([7]), 5)[0, -1] == 0


def test_fractional_times_lie_between_their_neighbours() -> None:
    low, mid, high = timestep_embedding(torch.tensor([1.0, 1.5, 2.0]), 64)[:, 40:]
    assert ((low < mid) & (mid < high)).all()


def test_vae_halving_pads_right_and_bottom() -> None:
    layer = Downsample(1)
    torch.nn.init.zeros_(layer.conv.bias)
    torch.nn.init.zeros_(layer.conv.weight)
    layer.conv.weight.data[0, 0, 0, 0] = 1.0                          # the kernel's top left corner
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert layer(x)[0, 0].tolist() == [[0, 2], [8, 10]]               # so nothing was padded above or to the left
    layer.conv.weight.data.zero_()[0, 0, 2, 2] = 1.0
    assert layer(x)[0, 0].tolist() == [[10, 0], [0, 0]]               # and what was padded is zero


def test_upsampling_repeats_pixels() -> None:
    layer = Upsample(1)
    zero(layer.conv).weight.data[0, 0, 1, 1] = 1.0
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert layer(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_factor_counts_the_halvings() -> None:
    assert VAEConfig().factor == 8
    assert VAEConfig(channel_mult=(1, 2)).factor == 2


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("learns", ["nothing", "weights", "emb"])
def test_what_is_told_after_a_convolution(learns: str, images: int) -> None:
    """One vector for all images, and one each; the gradients of what learns are those of the sum."""
    torch.manual_seed(0)
    conv = Conv2d(4, 5, 3, padding=1).double().requires_grad_(learns == "weights")
    x, emb = torch.randn(3, 4, 6, 7, dtype=torch.float64), torch.randn(images, 5, 1, 1, dtype=torch.float64)
    emb.requires_grad_(learns == "emb")
    wanted = F.conv2d(x, conv.weight, conv.bias, padding=1) + emb
    with torch.set_grad_enabled(learns != "nothing"):
        found = conv_plus(conv, x, emb)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)           # a few roundings of numbers of order one
    sources = {"nothing": [], "weights": [conv.weight, conv.bias], "emb": [emb]}[learns]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), sources) for y in (found, wanted) if sources)):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("branch", [torch.bfloat16, torch.float32])
def test_a_branch_of_another_dtype_rounds_no_sum(branch: torch.dtype) -> None:
    found = plus(torch.ones(3, dtype=branch), torch.full((3,), 2.0**-10))
    assert found.dtype == torch.float32
    assert found.tolist() == [1 + 2**-10] * 3                               # which bfloat16, of 8 bits, does not hold


@torch.no_grad()
def test_what_all_images_are_told_costs_no_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "plus", lambda *args: pytest.fail("it was added"))
    conv_plus(Conv2d(2, 2, 1).requires_grad_(False), torch.ones(3, 2, 4, 4), torch.ones(1, 2, 1, 1))


@torch.no_grad()
def test_a_residual_block_is_told_the_time_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(residual, "conv_plus", lambda *args: calls.append(args) or conv_plus(*args))
    ResBlock(4, 4, 8, 2).requires_grad_(False)(torch.ones(3, 4, 6, 6), Condition(torch.ones(1, 8), None))
    assert len(calls) == 1


@pytest.mark.parametrize("make", [lambda: Linear(6, 5), lambda: Linear(6, 5, bias=False), lambda: Pointwise(6, 5, 1)])
def test_where_products_are_slow_a_frozen_linear_layer_is_a_frozen_product(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: it has the value and the gradient of the product. What learns stays autograd's own."""
    monkeypatch.setattr(products, "matrix_products_are_fast", lambda: False)
    made, product = [], products.frozen_product
    monkeypatch.setattr(products, "frozen_product", lambda *args: made.append(product(*args)) or made[-1])
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, 7, 6, requires_grad=True)
    bias = None if layer.bias is None else layer.bias.double()
    wanted = F.linear(x.double(), layer.weight.flatten(1).double(), bias)
    for learns in layer.parameters():
        layer.requires_grad_(False)
        learns.requires_grad_()
        assert torch.autograd.grad(layer(x).sum(), learns)[0].shape == learns.shape
    assert not made
    found = layer.requires_grad_(False)(x)
    assert len(made) == 1
    # float32 sums of six products of order one
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    (dx,), (exact,) = (torch.autograd.grad(y.square().sum(), x) for y in (found, wanted))
    torch.testing.assert_close(dx, exact, rtol=0, atol=1e-4)
    assert layer.double()(x.double()).dtype == torch.float64
    assert len(made) == 1


@pytest.mark.parametrize(
    "part",
    [
        ResBlock(4, 4, 8, 2), ResBlock(4, 4, 8, 2, scale_shift=True), ImageAttention(4, 2, 2, True),
        JointAttention(4, 6, 2, 2), SpatialTransformer(4, 6, 2, 2, 1, False), SpatialTransformer(4, 6, 2, 2, 1, True),
    ],
)  # fmt: skip
def test_a_new_branch_is_silent(part: nn.Module) -> None:
    """Its last layer starts at zero (openai/guided-diffusion, `zero_module`; Dhariwal & Nichol 2021)."""
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(part(x, Condition(torch.randn(2, 8), torch.randn(2, 3, 6))), x)


def test_a_new_unet_predicts_zero() -> None:
    unet = UNet(UNetConfig(3, 6, 8, (1, 2), 1, (1,), 2, context_dim=6, norm_groups=4))
    assert unet(torch.randn(1, 3, 4, 4), torch.tensor([5]), torch.randn(1, 3, 6)).eq(0).all()


def test_a_residual_block_that_resamples_does_so_to_both_of_its_branches() -> None:
    """Of any widths, so that a shortcut of its own reads the map of the new size."""
    block, x = ResBlock(4, 6, 8, 2, resample=half), torch.randn(1, 4, 6, 6)
    shortcut = block.skip_connection
    wanted = F.conv2d(F.avg_pool2d(x, 2), shortcut.weight, shortcut.bias)
    torch.testing.assert_close(block(x, Condition(torch.ones(1, 8), None)), wanted)            # the other one is silent


def test_a_shortcut_may_be_replaced() -> None:
    """By a layer of the reader's own, which wraps what was there."""
    block, x = ResBlock(4, 6, 8, 2).requires_grad_(False), torch.randn(1, 4, 5, 5)
    cond = Condition(torch.ones(1, 8), None)
    wanted = block(x, cond)
    block.skip_connection = torch.nn.Sequential(block.skip_connection)
    assert torch.equal(block(x, cond), wanted)


class Plus(nn.Module):
    """What learns, added to a frozen weight (a LoRA's sum, without its product)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.learned


@pytest.mark.parametrize("make", [
    lambda: conv3x3(8, 8), lambda: GroupNorm(2, 8), lambda: NormSiLU(2, 8), lambda: Upsample(8),
    lambda: ResBlock(8, 8, 6, 2), lambda: Linear(8, 8),
])  # fmt: skip
def test_a_frozen_weight_with_something_learned_added_to_it_learns(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network, x = make().double(), torch.randn(2, 8, 8, 8, dtype=torch.float64)
    more = [Condition(torch.randn(2, 6, dtype=torch.float64), None)] if isinstance(network, ResBlock) else []
    layers = [layer for layer in network.modules() if getattr(layer, "weight", None) is not None]
    for layer in layers:
        nn.init.normal_(layer.weight)
    y = network(x, *more)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, [layer.weight for layer in layers], dy)
    network.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Plus(layer.weight))
    found = torch.autograd.grad(network(x, *more), [layer.parametrizations.weight[0].learned for layer in layers], dy)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("make", [lambda: conv3x3(8, 8), lambda: GroupNorm(2, 8), lambda: NormSiLU(2, 8),
                                  lambda: Upsample(8), lambda: Linear(8, 8)])  # fmt: skip
@pytest.mark.parametrize("how", ["parametrization", "network of weights"])
def test_a_checkpoint_has_the_gradients_of_made_weights(
    make: Callable[[], nn.Module], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first run they ask for no gradient, in the second they do: both have to go, and to keep, alike."""
    monkeypatch.setattr(checkpointing, "DEAR", 1)
    monkeypatch.setattr(products, "matrix_products_are_fast", lambda: False)
    torch.manual_seed(0)
    network, x = make().requires_grad_(False), torch.randn(2, 8, 8, 8, requires_grad=True)
    layer, after = getattr(network, "conv", network), conv3x3(8, 8).requires_grad_(False)
    weight, function = layer.weight, lambda x: after(network(x)).sin()
    if how == "parametrization":
        parametrize.register_parametrization(layer, "weight", Plus(weight))
        learned = layer.parametrizations.weight[0].learned
    else:
        del layer.weight
        learned = torch.zeros_like(weight, requires_grad=True)
        network.register_forward_pre_hook(lambda *_: setattr(layer, "weight", weight + learned))
    y, checked = function(x), checkpointing.checkpoint(function, x, weights=[learned])
    assert torch.equal(y, checked)
    found = [torch.autograd.grad(each.sum(), (x, learned)) for each in (y, checked)]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("make", [lambda: conv3x3(8, 8), lambda: GroupNorm(2, 8), lambda: NormSiLU(2, 8),
                                  lambda: Upsample(8), lambda: Linear(8, 8)])  # fmt: skip
def test_a_bias_learns_beside_a_frozen_weight(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network, x = make().double(), torch.randn(2, 8, 8, 8, dtype=torch.float64)
    biases = [weight for name, weight in network.named_parameters() if name.endswith("bias")]
    wanted = torch.autograd.grad(network(x).square().sum(), biases)
    network.requires_grad_(False)
    for bias in biases:
        bias.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(network(x).square().sum(), biases), wanted)


def test_transformers_are_as_deep_as_is_asked() -> None:
    unet = UNet(UNetConfig(3, 3, 8, (1,), 1, (1,), 2, context_dim=6, transformer_depth=2, norm_groups=4))
    depths = [len(part.transformer_blocks) for part in unet.modules() if isinstance(part, SpatialTransformer)]
    assert depths == [2] * 4                                                # one down, the middle's, two up


@pytest.mark.parametrize(
    "how",
    [
        {"padding": 1, "padding_mode": "circular"}, {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "dilation": 2}, {"padding": 1, "groups": 4}, {"padding": "same"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("wrapped", ["alone", "doubled", "plus", "normed"])
def test_a_convolution_that_is_made_otherwise_is_torch_s_when_frozen_too(how: dict[str, Any], wrapped: str) -> None:
    """As those that pad in a circle, for pictures that are tiles."""
    conv, x = Conv2d(32, 32, 3, **how).requires_grad_(False), torch.randn(1, 32, 16, 16)
    emb, norm = torch.randn(1, 32, 1, 1), NormSiLU(4, 32).requires_grad_(False)
    with torch.no_grad():
        theirs = {
            "alone": lambda: nn.Conv2d.forward(conv, x), "doubled": lambda: nn.Conv2d.forward(conv, twice(x)),
            "plus": lambda: nn.Conv2d.forward(conv, x) + emb, "normed": lambda: nn.Conv2d.forward(conv, norm(x)),
        }  # fmt: skip
        ours = {
            "alone": lambda: conv(x), "doubled": lambda: conv_of_doubled(conv, x),
            "plus": lambda: conv_plus(conv, x, emb), "normed": lambda: norm_conv(norm, conv, x),
        }  # fmt: skip
        torch.testing.assert_close(ours[wrapped](), theirs[wrapped](), rtol=0, atol=1e-5)      # sums of 288 below 4


def test_a_convolution_that_finds_its_own_padding_has_a_gradient() -> None:
    conv, x = Conv2d(8, 8, 3, padding="same").requires_grad_(False), torch.randn(1, 8, 6, 6, requires_grad=True)
    found, wanted = (torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (conv, lambda x: nn.Conv2d.forward(conv, x)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)                               # sums of 72 below 4


def test_a_unet_may_be_told_to_pad_in_a_circle() -> None:
    """Moved round by a whole cell, its answer moves with it."""
    unet, x = tiny_model().unet, torch.randn(1, 4, 16, 16)
    for part in unet.modules():
        if isinstance(part, Conv2d):
            part.padding_mode = "circular"
    t, context, by = torch.tensor([500.0]), torch.randn(1, 7, unet.config.context_dim), unet.config.factor
    with torch.no_grad():
        moved, still = unet(x.roll((by, by), (2, 3)), t, context), unet(x, t, context)
    # float32's roundings, of sums in another order, through all layers: 2.3e-6 at most in eight random networks
    torch.testing.assert_close(moved, still.roll((by, by), (2, 3)), rtol=0, atol=1e-5)
    assert (moved - still).abs().max() > 1                                  # 2.3 at least


def test_convolutions_and_gates_without_a_bias() -> None:
    conv, x, emb = Conv2d(32, 32, 3, padding=1, bias=False), torch.randn(1, 32, 8, 8), torch.randn(1, 32, 1, 1)
    gate, tokens = GEGLU(16, 32), torch.randn(1, 5, 16)
    gate.proj.bias = None
    value, by = (tokens @ gate.proj.weight.T).chunk(2, dim=-1)
    with torch.no_grad():
        conv.requires_grad_(False)
        plainly = F.conv2d(twice(x), conv.weight, padding=1), F.conv2d(x, conv.weight, padding=1) + emb
        found = conv_of_doubled(conv, x), conv_plus(conv, x, emb)
        torch.testing.assert_close(found, plainly, rtol=0, atol=1e-5)                          # as above
        torch.testing.assert_close(gate.requires_grad_(False)(tokens), value * F.gelu(by), rtol=0, atol=1e-5)
