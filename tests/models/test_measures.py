"""A whole network with every measure against one with none: every kind of attention, every level, every kernel.

With weights that want a gradient all operations are autograd's own, in the plain memory layout: that is the twin.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks._saved_bytes import SavedBytes
from models import attention, bands, checkpointing, frozen, sliced_attention, transformer
from models.attend import AttentionKind
from models.attention import ImageAttention, JointAttention, SpatialTransformer
from models.checkpointing import Checkpointing
from models.condition import Condition
from models.errors import ModelError
from models.transformer import TransformerBlock
from models.unet import ResBlock, UNet, UNetConfig
from tests.tiny import randomise, tiny_model

COMMON = {"num_heads": None, "head_channels": 16, "context_dim": 24}
ADM = {"resblock_updown": True, "scale_shift": True}
KINDS = {
    "transformer": UNetConfig(4, 4, 32, (1, 2), 1, (1, 2), **COMMON),
    "two deep, linear": UNetConfig(4, 4, 32, (1, 2), 1, (2,), **COMMON, transformer_depth=2, linear_proj=True),
    "joint": UNetConfig(4, 6, 32, (1, 2), 1, (1, 2), **COMMON, attention="joint", **ADM),
    "self": UNetConfig(4, 4, 32, (1, 2), 1, (2,), **COMMON, attention="self", **ADM),
    "self_legacy": UNetConfig(4, 4, 32, (1, 2), 1, (2,), **COMMON, attention="self_legacy"),
}
LEVELS = ("none", "attention", "blocks")


def network(kind: str, dtype: torch.dtype) -> UNet:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        unet = UNet(KINDS[kind])
        randomise(unet)
    return unet.to(dtype)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {"x": (2, 4, 8, 8), "context": (2, 5, 24), "pooled": (2, 128)}
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def gradients(
    unet: UNet, wanted: set[str], level: Checkpointing = "none", kernel: AttentionKind = "auto", images: int = 2
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the wanted inputs: those that the network reads."""
    all_inputs = inputs(unet.out[2].weight.dtype)
    given = {name: x[:images].clone().requires_grad_(name in wanted) for name, x in all_inputs.items()}
    out = unet(given["x"], torch.tensor([3, 700])[:images], given["context"], given["pooled"], level, kernel)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names = sorted(wanted)
    found = torch.autograd.grad((out * weights).sum(), [given[name] for name in names], allow_unused=True)
    return out.detach(), {name: gradient for name, gradient in zip(names, found) if gradient is not None}


@pytest.fixture(params=[False, True], ids=["nothing dear", "dear"])
def dear(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether checkpoints keep what convolutions and attention make: in networks as small as these nothing is dear."""
    if request.param:
        monkeypatch.setattr(checkpointing, "DEAR", 1)
    return request.param


@pytest.mark.parametrize("kernel", ["sliced", "fused", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_has_the_gradients_of_none(kind: str, kernel: AttentionKind, dear: bool) -> None:
    unet = network(kind, torch.float64)
    everything = {"x", "context", "pooled"}
    unet.requires_grad_(True)
    out, without = gradients(unet, everything, kernel="fused")
    unet.requires_grad_(False)
    for wanted in (everything, {"context"} if "self" not in kind else {"pooled"}):
        levels = {level: gradients(unet, wanted, level, kernel) for level in LEVELS}
        for y, found in levels.values():
            # float64 rounds at 2e-16, a few hundred operations deep, and numbers are of order one
            torch.testing.assert_close(y, out, rtol=1e-11, atol=1e-11)
            assert found.keys() == wanted & without.keys() != set()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, without[name], rtol=1e-11, atol=1e-11)
                assert torch.equal(gradient, levels["none"][1][name])      # a level repeats itself to the bit


@pytest.mark.parametrize("kind", KINDS)
def test_in_single_precision(kind: str) -> None:
    unet = network(kind, torch.float32)
    exact = gradients(network(kind, torch.float64), {"x", "pooled"}, kernel="fused")
    for level in LEVELS:
        out, found = gradients(unet, {"x", "pooled"}, level, "sliced")
        # a hundred roundings of 6e-8, relative to the largest
        assert (out - exact[0]).abs().max() < 1e-5 * exact[0].abs().max()
        for name, gradient in found.items():
            assert (gradient - exact[1][name]).abs().max() < 1e-5 * exact[1][name].abs().max()


@pytest.mark.parametrize("wanted", [{"context"}, {"pooled"}])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_level_repeats_itself_to_the_bit_in_half_precision(
    kind: str, images: int, wanted: set[str], dear: bool
) -> None:
    """There layers round otherwise where no gradient is wanted, which a checkpoint's first run must not."""
    unet = network(kind, torch.bfloat16).requires_grad_(False)
    wanted = wanted if "self" not in kind else {"pooled"}
    plain = gradients(unet, wanted, images=images)
    for level in LEVELS[1:]:
        out, found = gradients(unet, wanted, level, images=images)
        assert torch.equal(out, plain[0])
        assert all(torch.equal(found[name], plain[1][name]) for name in wanted)


def test_what_is_dear_is_computed_once(dear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for module, name in ((frozen.F, "conv2d"), (sliced_attention, "by_slices")):
        usual = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, usual=usual, **k: made.append(name) or usual(*a, **k))
    unet, counts = network("transformer", torch.float64).requires_grad_(False), []
    for level in LEVELS:
        gradients(unet, {"context", "x"}, level, "sliced")
        counts.append([made.count("conv2d"), made.count("by_slices")])
        made.clear()
    none, of_attention, of_blocks = counts
    assert min(none) > 0
    if dear:
        assert none == of_attention == of_blocks
    else:
        assert none[0] == of_attention[0] < of_blocks[0]
        assert 2 * none[1] == of_attention[1] == of_blocks[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_repeats_itself_to_the_bit_on_large_maps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which go in bands where no gradient is wanted, and neither of a checkpoint's two runs may."""
    monkeypatch.setattr(bands, "is_large", lambda x: True)
    unet = network(kind, torch.float32).requires_grad_(False)
    wanted = "context" if "self" not in kind else "pooled"
    plain = gradients(unet, {wanted})
    for level in LEVELS[1:]:
        out, found = gradients(unet, {wanted}, level)
        assert torch.equal(out, plain[0])
        assert torch.equal(found[wanted], plain[1][wanted])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_one_image_may_be_told_several_texts(kind: str, pooled: bool) -> None:
    unet, given, times = network(kind, torch.float64).requires_grad_(False), inputs(torch.float64), (3, 700)
    texts = torch.cat([given["context"], given["context"].flip(0, 1), 2 * given["context"]]).requires_grad_()
    told = torch.cat([given["pooled"], -given["pooled"], 0 * given["pooled"]]) if pooled else None
    if "self" in kind and not pooled:
        texts = None                                                           # nothing tells them apart
    found, wanted = (
        unet(given["x"].repeat(k, 1, 1, 1), torch.tensor(times * k), texts, told, level)
        for k, level in ((1, "blocks"), (1 if texts is None else 3, "none"))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)      # a few hundred float64 roundings of 2e-16
    if texts is not None and "self" not in kind:
        assert not torch.allclose(found[:2], found[2:4], atol=1e-2)
        weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
        mine, theirs = (torch.autograd.grad((y * weights).sum(), texts)[0] for y in (found, wanted))
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[AttentionKind]:
    """The kernels that are asked for from now on."""
    kernels: list[AttentionKind] = []
    for module in (attention, transformer):
        attend = module.attend
        monkeypatch.setattr(module, "attend", lambda *qkv, kind, a=attend: kernels.append(kind) or a(*qkv, kind=kind))
    return kernels


@pytest.mark.parametrize("kernel", ["auto", "sliced", "fused", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_takes_the_kernel_that_was_asked_for(
    kind: str, kernel: AttentionKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = watched(monkeypatch)
    unet, given = network(kind, torch.float32), inputs(torch.float32)
    unet(given["x"], torch.tensor([3, 700]), given["context"], given["pooled"], attention=kernel)
    each = {TransformerBlock: 2, ImageAttention: 1, JointAttention: 1}
    assert kernels == [kernel] * sum(each.get(type(module), 0) for module in unet.modules())


def test_a_model_asks_for_the_kernel_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = watched(monkeypatch)
    model = replace(tiny_model(), attention="sliced")
    model.predict(torch.ones(1, 4, 8, 8), torch.tensor([5]), model.encode_text(model.tokenizer.encode(["a dog"])))
    assert set(kernels) == {"sliced"}
    assert model.setting.attention == "sliced"


@pytest.mark.parametrize("kernel", ["sliced", "fused"])
@pytest.mark.parametrize("kind", ["transformer", "joint"])
def test_images_that_are_told_several_texts_each(kind: str, kernel: AttentionKind) -> None:
    """One after another: two images and four texts are the two images twice."""
    unet, given = network(kind, torch.float64), inputs(torch.float64)
    x, t, context = given["x"], torch.tensor([3, 700]), torch.cat([given["context"], -given["context"]])
    wanted = unet(torch.cat([x, x]), torch.cat([t, t]), context, attention=kernel)
    for b, some in ((2, slice(4)), (1, slice(0, 4, 2))):
        found = unet(x[:b], t[:b], context[some], attention=kernel)
        torch.testing.assert_close(found, wanted[some], rtol=1e-12, atol=1e-12)     # float64, otherwise cut


@pytest.mark.parametrize("images", [0, 3])
def test_images_that_do_not_divide_the_texts(images: int) -> None:
    unet, given = network("transformer", torch.float32), inputs(torch.float32)
    with pytest.raises(ModelError, match=f"{images} images for 2 texts"):
        unet(torch.zeros(images, 4, 8, 8), torch.zeros(images), given["context"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_keeps_its_inputs_and_nothing_else(kind: str) -> None:
    unet, storages = network(kind, torch.float32), {}

    def enter(module: nn.Module, inputs: tuple) -> None:
        x, cond = inputs if len(inputs) == 2 else (inputs[0], None)
        of_kind = {ResBlock: "emb", SpatialTransformer: "context", JointAttention: "context"}
        also = getattr(cond, of_kind.get(type(module), ""), None)
        read = [x] if also is None else [x, also]
        if any(y.requires_grad for y in read):
            storages.update({y.untyped_storage().data_ptr(): y.untyped_storage() for y in read})

    for module in unet.modules():
        if isinstance(module, ResBlock | SpatialTransformer | JointAttention | ImageAttention) or module is unet.out[0]:
            module.register_forward_pre_hook(enter)
    context, pooled = (inputs(torch.float32)[name] for name in ("context", "pooled"))
    (pooled if "self" in kind else context).requires_grad_()
    with SavedBytes(*unet.parameters()) as counter:
        unet(inputs(torch.float32)["x"], torch.tensor([3, 700]), context, pooled, "blocks")
    last_norm = 2 * 4 * len(inputs(torch.float32)["x"]) * unet.out[0].num_channels      # its statistics, in float32
    assert counter.bytes - sum(storage.nbytes() for storage in storages.values()) in (0, last_norm)


@pytest.mark.parametrize(
    ("make", "shape", "branches"),
    [
        (lambda: TransformerBlock(32, 24, 2), (2, 64, 32), 3),
        (lambda: JointAttention(32, 24, 2, 8), (2, 32, 8, 8), 1),
        (lambda: ImageAttention(32, 2, 8, True), (2, 32, 8, 8), 1),
    ],
    ids=["transformer", "joint", "self"],
)
def test_of_each_attention_and_feed_forward_the_attention_level_keeps_the_inputs(
    make: Callable[[], nn.Module], shape: tuple[int, ...], branches: int
) -> None:
    part = make().requires_grad_(False)
    x, context = torch.randn(shape, requires_grad=True), inputs(torch.float32)["context"]
    with SavedBytes(*part.parameters()) as counter:
        part(x, Condition(torch.zeros(2, 1), context, "attention"))
    assert counter.bytes == branches * x.nbytes + (0 if isinstance(part, ImageAttention) else context.nbytes)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_learn_the_same_at_every_level(kind: str) -> None:
    unet = network(kind, torch.float64).requires_grad_(True)
    found = []
    for level in LEVELS:
        unet.zero_grad()
        given = inputs(torch.float64)
        unet(given["x"], torch.tensor([3, 700]), given["context"], given["pooled"], level).square().sum().backward()
        found.append([weight.grad for weight in unet.parameters()])
    for level in found[1:]:
        assert all(map(torch.equal, level, found[0]))
