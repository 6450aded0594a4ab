"""Hooks, and layers of the reader's own in place of ours: none is passed by, and what a hook has kept stays."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models import bands, fused_linear
from models.attention import TransformerBlock
from models.condition import Condition
from models.layers import Conv2d, Linear, Pointwise, plus_conv
from tests.tiny import tiny_classes, tiny_glide, tiny_model

LEAVES = nn.Conv2d, nn.Conv1d, nn.Linear, nn.GroupNorm, nn.LayerNorm
NETWORKS = {"latent": lambda: tiny_model().unet, "glide": lambda: tiny_glide().unet,
            "classes": lambda: tiny_classes().unet, "vae": lambda: tiny_model().vae}  # fmt: skip


@pytest.fixture(params=[(name, dtype) for name in NETWORKS for dtype in (torch.float32, torch.bfloat16)], ids=str)
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """With every shortcut taken where it can be."""
    monkeypatch.setattr(bands, "is_large", lambda x: True)
    monkeypatch.setattr(fused_linear, "products_have_bfloat16", torch.ops.mkldnn._is_mkldnn_bf16_supported)
    name, dtype = request.param
    return NETWORKS[name]().to(dtype)


def answer(network: nn.Module, images: int, recorded: bool) -> Tensor:
    """To the same input for the same number of images."""
    numbers = torch.Generator().manual_seed(0)
    config, dtype = network.config, next(network.parameters()).dtype
    x = torch.randn(images, config.in_channels, 8, 8, generator=numbers).to(dtype).requires_grad_(recorded)
    with torch.set_grad_enabled(recorded):
        if hasattr(network, "decode"):
            return network.decode(network.encode(x)[:, : config.latent_channels])
        context = torch.randn(images, 24, 32, generator=numbers).to(dtype)
        pooled = None if config.attention == "transformer" else torch.randn(images, 128, generator=numbers).to(dtype)
        return network(x, torch.full((images,), 500), context if config.context_dim else None, pooled)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("images", [1, 2])
def test_a_hook_sees_each_layer_once_and_may_keep_what_it_saw(
    network: nn.Module, images: int, recorded: bool
) -> None:
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for module in network.modules():
        if isinstance(module, (*LEAVES, TransformerBlock)):
            module.register_forward_hook(lambda module, _, y: seen.append((module, y, y.detach().clone())))
    answer(network, images, recorded)
    wanted = [module for module in network.modules() if isinstance(module, (*LEAVES, TransformerBlock))]
    assert sorted(map(id, wanted)) == sorted(id(module) for module, _, _ in seen)
    for module, y, as_it_was in seen:
        assert len(y) == images, module
        assert torch.equal(y, as_it_was), module


@pytest.mark.parametrize("images", [1, 2])
def test_a_hook_of_one_layer_alone_sees_it_once(network: nn.Module, images: int) -> None:
    """Where nothing is recorded, and two layers of which neither is heard go together. Of layers that end in the same
    two names, as every attn1.to_q, the last.
    """
    kinds = {tuple(name.split(".")[-2:]): name for name, _ in network.named_modules()}
    for name in kinds.values():
        layer = network.get_submodule(name)
        if isinstance(layer, LEAVES):
            seen: list[int] = []
            handle = layer.register_forward_hook(lambda *args, seen=seen: seen.append(len(args[2])))
            answer(network, images, recorded=False)
            handle.remove()
            assert seen == [images], name


@pytest.mark.parametrize("when", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("images", [1, 2])
def test_every_kind_of_hook_is_called(images: int, when: str, everywhere: bool) -> None:
    """A layer's own, and one of all modules. Of what comes of the time and the text alone no gradient goes back."""
    network, calls = tiny_model().unet, []
    leaves = {layer: name for name, layer in network.named_modules() if isinstance(layer, LEAVES)}
    told = "time_embed", "emb_layers", "attn2.to_k", "attn2.to_v"
    wanted = [name for name in leaves.values() if "backward" not in when or not any(part in name for part in told)]

    def hook(layer: nn.Module, *_: object) -> None:
        calls.append(leaves.get(layer))

    if everywhere:
        handles = [getattr(nn.modules.module, f"register_module_{when}_hook")(hook)]
    else:
        handles = [getattr(layer, f"register_{when}_hook")(hook) for layer in leaves]
    try:
        answer(network, images, recorded=True).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name in calls if name) == sorted(wanted)


def in_a_layer_around_it(layer: nn.Module) -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, *inputs: Tensor) -> Tensor:
            return 2 * layer(*inputs)

    return Twice()


def derived(layer: nn.Module) -> nn.Module:
    kind = type(layer)
    layer.__class__ = type("Twice", (kind,), {"forward": lambda self, *inputs: 2 * kind.forward(self, *inputs)})
    return layer


def with_another_forward(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda *inputs: 2 * forward(*inputs)
    return layer


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _, inputs, y: 2 * y)
    return layer


@pytest.mark.parametrize("change", [in_a_layer_around_it, derived, with_another_forward, hooked])
@pytest.mark.parametrize("images", [1, 2])
def test_a_layer_that_does_more_does_it_wherever_it_is(
    network: nn.Module, images: int, change: Callable[[nn.Module], nn.Module]
) -> None:
    """What it adds is the same as from weights that are twice as large, recorded or not."""
    layers = {name: layer for name, layer in network.named_modules() if type(layer) in (Conv2d, Linear, Pointwise)}
    assert layers
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    with torch.no_grad():
        for layer in layers.values():
            for weight in layer.parameters():
                weight *= 2
    wanted = answer(network, images, recorded=True)
    network.load_state_dict(before)
    for name, layer in layers.items():
        *path, last = name.split(".")
        setattr(network.get_submodule(".".join(path)), last, change(layer))
    # twice is exact; one way and another are rounded differently, by up to 2^-24 or 2^-9 in each of some ten layers
    near = (1e-5 if wanted.dtype == torch.float32 else 0.03) * wanted.abs().max().item()
    for recorded in (False, True):
        torch.testing.assert_close(answer(network, images, recorded), wanted, rtol=0, atol=near)


@torch.no_grad()
def test_a_hook_of_a_shortcut_sees_a_map() -> None:
    """Where maps lie channels-last, as real ones do, its product and the addition would be one."""
    h, x = (torch.randn(2, 8, 4, 4).bfloat16().to(memory_format=torch.channels_last) for _ in range(2))
    conv, seen = Conv2d(8, 8, 1).bfloat16(), []
    wanted = h + conv(x)
    conv.register_forward_hook(lambda layer, x, y: seen.append(y.shape))
    assert torch.equal(plus_conv(h, conv, x), wanted)
    assert seen == [(2, 8, 4, 4)]


class Own(nn.Module):
    """In an attention's or a feed-forward's place: a tenth of what it reads."""

    def forward(self, x: Tensor, *more: object) -> Tensor:
        return 0.1 * x


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["attn1", "attn2", "ff"])
def test_a_block_s_branches_may_be_one_s_own(name: str, recorded: bool) -> None:
    """What they return is added: nothing from a branch of zeros, and from another what it makes of its norm."""
    torch.manual_seed(0)
    block, tokens = TransformerBlock(32, 16, 2).requires_grad_(False), torch.randn(2, 9, 32).requires_grad_(recorded)
    setattr(block, name, Own())
    outputs: dict[str, Tensor] = {}
    norm = {"attn1": block.norm1, "attn2": block.norm2, "ff": block.norm3}[name]
    norm.register_forward_hook(lambda layer, inputs, y: outputs.update(x=inputs[0], y=y))
    following = {"attn1": block.norm2, "attn2": block.norm3}.get(name)
    if following is not None:
        following.register_forward_hook(lambda layer, inputs, y: outputs.update(after=inputs[0]))
    with torch.set_grad_enabled(recorded):
        out = block(tokens, Condition(None, torch.randn(2, 5, 16), "attention" if recorded else "none", "auto", None))
    after = outputs.get("after", out)
    torch.testing.assert_close(after, outputs["x"] + 0.1 * outputs["y"], rtol=0, atol=1e-6)     # float32, of order 1
