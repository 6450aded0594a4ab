"""Hooks, and layers of the reader's own in place of ours: none is passed by, and what a hook has kept stays."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models import bands, fused_linear
from models.condition import Condition
from models.layers import Conv2d, Linear, Pointwise, plus_conv
from models.transformer import GEGLU, Attention, FeedForward, TransformerBlock
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


@pytest.mark.parametrize("kind", [Conv2d, Linear, Pointwise])
def test_a_class_with_another_forward_is_called_wherever_it_is(
    network: nn.Module, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of all layers of a kind with weights that are half as large, recorded or not."""
    layers = [layer for layer in network.modules() if isinstance(layer, kind)]
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    with torch.no_grad():
        for layer in layers:
            for weight in layer.parameters():
                weight *= 0.5
    wanted = answer(network, 2, recorded=True)
    network.load_state_dict(before)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *inputs: 0.5 * forward(self, *inputs))
    # rounded differently, see above: up to 3e-6 and 0.033 of the norm (Conv2d of the latent model)
    near = (1e-5 if wanted.dtype == torch.float32 else 0.06) * wanted.norm().item()
    for recorded in (False, True):
        assert (answer(network, 2, recorded) - wanted).norm().item() < near


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", [TransformerBlock, Attention, FeedForward, GEGLU])
def test_a_part_s_class_with_another_forward_is_called(
    kind: type[nn.Module], recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers what one of the same forward in each instance answers."""
    unet, calls = tiny_model().unet, []
    parts = [part for part in unet.modules() if type(part) is kind]

    def forward(self: nn.Module, x: Tensor, *more: object) -> Tensor:
        calls.append(self)
        return 0.5 * torch.tanh(x[..., :128] if kind is not GEGLU else torch.cat([x] * 4, dim=-1))

    for part in parts:
        part.forward = forward.__get__(part)
    wanted = answer(unet, 1, recorded)
    assert calls == parts
    for part in parts:
        del part.forward
    monkeypatch.setattr(kind, "forward", forward)
    assert torch.equal(answer(unet, 1, recorded), wanted)
    assert calls == 2 * parts


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def derived_feed_forward(block: TransformerBlock) -> None:
    block.ff.__class__ = type("Own", (FeedForward,), {"forward": lambda self, x: 2 * FeedForward.forward(self, x)})


def derived_attention(block: TransformerBlock) -> None:
    own = {"forward": lambda self, *read: 2 * Attention.forward(self, *read)}
    block.attn2.__class__ = type("Own", (Attention,), own)


LENGTHENED = {     # what is done to a block, and the layer of which it doubles the weights
    "a feed-forward of one's own class": (derived_feed_forward, "ff.net.2"),
    "an attention of one's own class": (derived_attention, "attn2.to_out.0"),
    "a feed-forward's hook": (lambda block: hooked(block.ff), "ff.net.2"),
    "an attention's hook": (lambda block: hooked(block.attn1), "attn1.to_out.0"),
    "a hook of to_out": (lambda block: hooked(block.attn1.to_out), "attn1.to_out.0"),
    "a hook of net": (lambda block: hooked(block.ff.net), "ff.net.2"),
    "a layer after to_out": (lambda block: block.attn2.to_out.append(Twice()), "attn2.to_out.0"),
    "a layer after net": (lambda block: block.ff.net.append(Twice()), "ff.net.2"),
    "to_out of one's own": (lambda block: setattr(block.attn2, "to_out", nn.Sequential(block.attn2.to_out, Twice())),
                            "attn2.to_out.0"),
}  # fmt: skip


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("what", LENGTHENED)
def test_what_is_put_to_a_branch_is_not_passed_by(what: str, recorded: bool) -> None:
    (change, doubled), (one, other) = LENGTHENED[what], (tiny_model().unet for _ in range(2))
    for path in ("input_blocks.1.1", "output_blocks.3.1"):
        block = f"{path}.transformer_blocks.0"
        change(one.get_submodule(block))
        with torch.no_grad():
            for weight in other.get_submodule(f"{block}.{doubled}").parameters():
                weight *= 2
    # twice is exact; the addition with the product or after it is rounded otherwise, 2^-24 each
    torch.testing.assert_close(answer(one, 2, recorded), answer(other, 2, recorded), rtol=1e-5, atol=1e-5)


GAPS = [(name, "input_blocks.1.0", gap) for name in ("latent", "glide")
        for gap in ("in_layers.1", "out_layers.1", "out_layers.2")]
GAPS += [("latent", "input_blocks.1.1.transformer_blocks.0", "ff.net.1")]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("fill", [lambda gap: Twice(), hooked], ids=["filled", "hooked"])
@pytest.mark.parametrize(("name", "path", "gap"), GAPS)
def test_the_gaps_that_the_published_names_leave_may_be_filled(
    name: str, path: str, gap: str, fill: Callable[[nn.Module], nn.Module], recorded: bool
) -> None:
    """By a dropout, for example; here by what doubles, as the kernel after it does that is twice as large."""
    (one, other), (row, i) = (NETWORKS[name]() for _ in range(2)), f"{path}.{gap}".rsplit(".", 1)
    gaps = one.get_submodule(row)
    gaps[int(i)] = fill(gaps[int(i)])
    with torch.no_grad():
        other.get_submodule(row)[-1].weight *= 2
    torch.testing.assert_close(answer(one, 2, recorded), answer(other, 2, recorded), rtol=1e-5, atol=1e-5)  # as above


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("whose", ["each", "the class"])
def test_convolutions_that_are_made_otherwise_are(whose: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual way to seamless pictures: a map of one's own padding, in place of torch's `_conv_forward`."""
    one, other = (tiny_model().unet.requires_grad_(not frozen) for _ in range(2))

    def circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        edge = self.padding[0]
        x = nn.functional.pad(x, (edge,) * 4, mode="circular") if edge else x
        return nn.functional.conv2d(x, weight, bias, self.stride)

    for conv in (layer for layer in other.modules() if isinstance(layer, nn.Conv2d) and layer.padding != (0, 0)):
        conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    wanted = answer(other, 2, recorded=False)
    assert (wanted - answer(one, 2, recorded=False)).abs().max() > 0.01
    if whose == "the class":
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", circular)
    else:
        for conv in (layer for layer in one.modules() if isinstance(layer, nn.Conv2d)):
            conv._conv_forward = circular.__get__(conv)
    for recorded in (False, True):
        # float32, by the same convolutions: 1x1 ones in another order
        torch.testing.assert_close(answer(one, 2, recorded), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["attn1", "attn2", "attn1.to_out", "ff", "ff.net", "ff.net.1"])
def test_a_hook_may_take_itself_out_or_put_one_in(name: str, recorded: bool) -> None:
    """Whoever asked twice made the last product of a branch twice, or never."""
    unet = tiny_model().unet
    wanted = answer(unet, 2, recorded)
    layer = unet.get_submodule(f"input_blocks.1.1.transformer_blocks.0.{name}")
    handle = layer.register_forward_hook(lambda *_: handle.remove())
    torch.testing.assert_close(answer(unet, 2, recorded), wanted, rtol=1e-5, atol=1e-5)     # float32, see above
    handles = []
    inner = next(part for part in layer.modules() if not list(part.children()))
    inner.register_forward_hook(lambda *_: handles.append(layer.register_forward_hook(lambda *_: None)))
    torch.testing.assert_close(answer(unet, 2, recorded), wanted, rtol=1e-5, atol=1e-5)
    assert handles
