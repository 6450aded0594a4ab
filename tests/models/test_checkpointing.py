"""Checkpoints: the same gradients to the bit, in less memory, whatever needs a gradient."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from benchmarks._saved_bytes import SavedBytes
from models import ModelError, TextFeatures
from models.checkpointing import ANOTHER_WAY, DEAR, checkpoint, dear, records
from models.layers import Linear
from tests.tiny import tiny_model


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def deep(x: Tensor, c: Tensor) -> Tensor:
    for i in range(8):
        x = torch.sin(x * c + i).exp()
    return x


def gradients(of: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(of(*inputs).sum(), [x for x in inputs if x.requires_grad])


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradients_are_equal_to_the_bit(needed: tuple[bool, bool]) -> None:
    x, c = (numbers(5, 3, seed=i).requires_grad_(need) for i, need in enumerate(needed))
    wanted = gradients(deep, x, c)
    found = gradients(lambda x, c: checkpoint(deep, x, c), x, c)
    assert all(map(torch.equal, found, wanted))
    nested = gradients(lambda x, c: checkpoint(lambda x, c: checkpoint(deep, deep(x, c), c), x, c), x, c)
    assert all(map(torch.equal, nested, gradients(lambda x, c: deep(deep(x, c), c), x, c)))


def test_what_is_computed_on_the_way_is_not_kept() -> None:
    x, c = numbers(1000).requires_grad_(), numbers(1000, seed=1)
    with SavedBytes() as plain:
        deep(x, c)
    with SavedBytes() as less:
        checkpoint(deep, x, c)
    assert less.bytes == 2 * 4 * 1000
    assert plain.bytes >= 8 * 2 * 4 * 1000                                 # of each round the argument and the value


def test_nothing_is_kept_where_nothing_needs_a_gradient() -> None:
    x = numbers(1000)
    with SavedBytes() as counter:
        assert not checkpoint(deep, x, x).requires_grad
        with torch.no_grad():
            assert not checkpoint(deep, x.requires_grad_(), x).requires_grad
    assert counter.bytes == 0


def test_random_numbers_are_those_of_the_first_time() -> None:
    def drop(x: Tensor) -> Tensor:
        return torch.dropout(x.exp(), 0.5, True) * torch.rand(())

    x, wanted, states = numbers(100).requires_grad_(), [], []
    for run in (drop, lambda x: checkpoint(drop, x)):
        torch.manual_seed(0)
        y = run(x).sum()
        torch.rand(3)                                                      # others draw in the meantime
        wanted += torch.autograd.grad(y, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*wanted)
    assert torch.equal(*states)                                            # and to others the backward pass draws none


def test_autocast_is_that_of_the_first_time() -> None:
    layer, x = nn.Linear(8, 8), numbers(3, 8).requires_grad_()

    def both(x: Tensor) -> Tensor:
        return layer(x).float().square()

    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = both(x).sum(), checkpoint(both, x, weights=layer.parameters()).sum()
    assert torch.equal(torch.autograd.grad(ours, x)[0], torch.autograd.grad(plain, x)[0])   # outside of the context


def test_where_autocast_keeps_no_casts_the_second_run_keeps_none_either() -> None:
    """A cast that is kept sums the gradients of its uses in 16 bits."""
    weight, x, found = numbers(64, 64).requires_grad_(), numbers(32, 64, seed=1).requires_grad_(), []

    def often(x: Tensor) -> Tensor:
        for _ in range(4):
            x = nn.functional.linear(x, weight).float()
        return x

    for run in (often, lambda x: checkpoint(often, x, weights=[weight])):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = run(x)
        found.append(torch.autograd.grad(y.sum(), [x, weight]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("leaf", [True, False])
def test_under_autocast_the_gradients_of_several_uses_are_added_as_without_it(leaf: bool) -> None:
    first, second, x = nn.Linear(32, 32), nn.Linear(32, 32), numbers(7, 32).requires_grad_()
    both = lambda x: first(x).float().sin() * second(x).float()  # noqa: E731
    weights, found = [*first.parameters(), *second.parameters()], []
    for run in (both, lambda x: checkpoint(both, x, weights=weights)):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x if leaf else x * 1)
        found += torch.autograd.grad(y.sum(), x)
    assert torch.equal(*found)


def test_several_outputs_of_which_some_are_used() -> None:
    def three(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.sin() * c, (c * c).detach(), x.cos()

    x, c = numbers(4).requires_grad_(), numbers(4, seed=1).requires_grad_()
    for which in ((0,), (2,), (0, 2), (0, 1)):
        wanted, found = (
            torch.autograd.grad(sum(outputs[i].sum() for i in which), (x, c), allow_unused=True)
            for outputs in (three(x, c), checkpoint(three, x, c))
        )
        assert torch.equal(found[0], wanted[0])
        assert (found[1] is None and wanted[1] is None) or torch.equal(found[1], wanted[1])


def test_of_what_depends_on_no_input_there_is_no_gradient() -> None:
    x = numbers(4).requires_grad_()
    assert torch.autograd.grad(checkpoint(lambda x: x.detach().sin(), x).sum(), x, allow_unused=True) == (None,)


@pytest.mark.parametrize("needs", [True, False])
def test_weights_are_trained_through_it(needs: bool) -> None:
    """Also where no input of the function needs a gradient, and by both ways to ask for gradients."""
    layer, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), numbers(3, 4).requires_grad_(needs)
    layer[0].bias.requires_grad_(False)
    weights = [w for w in layer.parameters() if w.requires_grad]
    wanted = torch.autograd.grad(layer(layer(x)).sum(), weights)
    run = lambda x: checkpoint(layer, checkpoint(layer, x, weights=weights), weights=layer.parameters())  # noqa: E731
    assert all(map(torch.equal, torch.autograd.grad(run(x).sum(), weights), wanted))
    run(x).sum().backward()
    assert all(torch.equal(weight.grad, w) for weight, w in zip(weights, wanted))
    assert layer[0].bias.grad is None


def test_a_weight_that_two_layers_share_has_the_gradient_of_one_weight() -> None:
    layer, x = nn.Linear(4, 4), numbers(3, 4)
    wanted = torch.autograd.grad(layer(x).sum(), layer.parameters())
    y = checkpoint(layer, x, weights=[*layer.parameters(), *layer.parameters()])
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), layer.parameters()), wanted))


def test_made_weights_that_are_kept_from_the_first_run_are_an_error() -> None:
    """They were made where autograd does not record, so that what they are made of would get no gradient."""
    layer, x = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), numbers(2, 3).requires_grad_()
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"within torch.nn.utils.parametrize.cached\(\)"):
        checkpoint(layer, x, weights=layer.parameters())
    layer.requires_grad_(False)
    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    with parametrize.cached():
        assert torch.equal(torch.autograd.grad(checkpoint(layer, x, weights=layer.parameters()).sum(), x)[0], wanted)


def test_an_input_that_is_changed_in_place_is_an_error() -> None:
    a, b = torch.ones(3), torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="changed an input in place"):
        checkpoint(lambda a, b: a.mul_(2) * b, a, b)
    assert not torch.no_grad()(records)()                       # nothing is left behind


class Dear(torch.autograd.Function):
    """x³, whose value takes so many multiplications a number; `made` counts how often they are done."""

    made: list[int] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, multiplications: int = DEAR) -> Tensor:
        ctx.save_for_backward(x)
        return dear(multiplications, lambda: Dear.made.append(multiplications) or x**3)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return 3 * ctx.saved_tensors[0] ** 2 * dy, None


@pytest.fixture
def made() -> list[int]:
    Dear.made = []
    return Dear.made


def mixed(x: Tensor, c: Tensor) -> Tensor:
    y = Dear.apply(x * c).add_(c)                               # written into: what is kept has to be a copy
    z = Dear.apply(y.sin(), DEAR - 1)
    return Dear.apply(z * c).mul_(2).cos()


def test_what_is_dear_is_computed_once(made: list[int]) -> None:
    x, c = numbers(6).requires_grad_(), numbers(6, seed=1).requires_grad_()
    wanted = gradients(mixed, x, c)
    assert made == [DEAR, DEAR - 1, DEAR]
    made.clear()
    assert all(map(torch.equal, gradients(lambda x, c: checkpoint(mixed, x, c), x, c), wanted))
    assert made == [DEAR, DEAR - 1, DEAR, DEAR - 1]
    made.clear()
    y = checkpoint(mixed, x, c).sum()
    for _ in range(2):                                          # the second time it still knows what it kept
        assert all(map(torch.equal, torch.autograd.grad(y, (x, c), retain_graph=True), wanted))
    assert made.count(DEAR) == 2


def test_in_nested_checkpoints_too(made: list[int]) -> None:
    def outer(x: Tensor, c: Tensor) -> Tensor:
        return Dear.apply(checkpoint(mixed, checkpoint(mixed, Dear.apply(x), c), c))

    x, c = numbers(6).requires_grad_(), numbers(6, seed=1).requires_grad_()
    wanted = gradients(lambda x, c: Dear.apply(mixed(mixed(Dear.apply(x), c), c)), x, c)
    made.clear()
    # c's gradients are added in another order: roundings of float32
    torch.testing.assert_close(gradients(lambda x, c: checkpoint(outer, x, c), x, c), wanted, rtol=1e-6, atol=0)
    assert made.count(DEAR) == 6
    made.clear()

    def recording(x: Tensor, c: Tensor) -> Tensor:
        with torch.enable_grad():                               # so that the inner one keeps something in the first run
            return outer(x, c)

    torch.testing.assert_close(gradients(lambda x, c: checkpoint(recording, x, c), x, c), wanted, rtol=1e-6, atol=0)
    assert made.count(DEAR) == 6


def test_a_gradient_within_a_first_run_keeps_nothing_of_its_own_second(made: list[int]) -> None:
    def guided(x: Tensor) -> Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(checkpoint(lambda x: Dear.apply(x).sin(), inner).sum(), inner)
        return Dear.apply(x) + slope

    x = numbers(6).requires_grad_()
    assert all(map(torch.equal, gradients(lambda x: checkpoint(guided, x), x), gradients(guided, x)))
    assert not torch.no_grad()(records)()


def test_what_is_kept_is_unpacked_once(made: list[int]) -> None:
    """By hooks, that may fetch it from elsewhere; torch's own checkpoint around this one allows it only once."""
    x, c = numbers(6).requires_grad_(), numbers(6, seed=1).requires_grad_()
    wanted, unpacked = gradients(mixed, x, c), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        y = checkpoint(mixed, x, c)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), (x, c)), wanted))
    assert len(unpacked) == 4                                   # two inputs and what was dear twice
    y = torch.utils.checkpoint.checkpoint(lambda x, c: checkpoint(mixed, x, c), x, c, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), (x, c)), wanted))


def test_what_a_checkpointed_function_does_under_no_grad_is_done_alike_in_both_runs(made: list[int]) -> None:
    """As in a hook: a layer that asks there whether something records has the same answer."""
    asked = []

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            asked.append(records())
            scale = Dear.apply(x) if records() else x**3
        return Dear.apply(x) * scale

    x = numbers(6).requires_grad_()
    assert torch.equal(*(gradients(f, x)[0] for f in (lambda x: checkpoint(function, x), function)))
    assert asked == [True, True, False]


def test_of_what_is_dear_a_copy_is_kept_and_nothing_where_nothing_is_checkpointed(made: list[int]) -> None:
    x = numbers(1000).requires_grad_()
    with SavedBytes() as counter:
        checkpoint(lambda x: Dear.apply(x.sin()).sin(), x)
    assert counter.bytes == 2 * 4 * 1000
    assert torch.equal(Dear.apply(x), x**3)
    assert made == [DEAR, DEAR]


@pytest.mark.parametrize("times", [(1, 2), (2, 1), (0, 1)])
def test_a_second_run_that_takes_another_way_is_an_error(times: tuple[int, int], made: list[int]) -> None:
    def changing(x: Tensor) -> Tensor:
        for _ in range(times[torch.is_grad_enabled()]):
            x = Dear.apply(x)
        return x.sin()

    x = numbers(3).requires_grad_()
    with pytest.raises(RuntimeError, match=ANOTHER_WAY):
        checkpoint(changing, x).sum().backward()
    assert not torch.no_grad()(records)()


def test_another_thread_s_first_run_is_not_recorded_here() -> None:
    entered, asked, there = threading.Event(), threading.Event(), []

    def wait(x: Tensor) -> Tensor:
        there.append(records())
        entered.set()
        asked.wait(10)
        return x.sin()

    thread = threading.Thread(target=checkpoint, args=(wait, numbers(3).requires_grad_()))
    thread.start()
    assert entered.wait(10)
    here = torch.no_grad()(records)()
    asked.set()
    thread.join()
    assert (there, here) == ([True], False)


def test_a_second_derivative_is_an_error() -> None:
    x = numbers(3).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad((checkpoint(lambda x: x**3, x) * x).sum(), x, create_graph=True)


def test_a_list_of_outputs_is_as_good_as_a_tuple() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y, z = checkpoint(lambda x: [x * x, 3 * x], x)
    (y + z).sum().backward()
    assert x.grad.tolist() == [7, 9]


@pytest.mark.parametrize(
    ("give", "found"),
    [(lambda y: {"y": y}, "dict"), (lambda y: (y, [y]), "list"), (lambda y: (x for x in (y,)), "generator")],
)
def test_outputs_that_would_lose_their_gradient_are_an_error(give: Callable[[Tensor], Any], found: str) -> None:
    x = numbers(3).requires_grad_()
    with pytest.raises(TypeError, match=f"gives a {found}.* where a tensor or a tuple of tensors is needed"):
        checkpoint(lambda x: give(x.sin()), x)
    assert checkpoint(lambda x: (x.sin(), None), x)[1] is None
    with torch.no_grad():
        checkpoint(lambda x: give(x.sin()), x)                  # nothing is lost where nothing has a gradient


def test_a_level_that_there_is_not() -> None:
    model = tiny_model()
    model.checkpointing = "block"
    with pytest.raises(ModelError, match="checkpointing is one of none, attention, blocks; 'block' is none of them"):
        model.predict(numbers(1, 4, 8, 8), torch.tensor([5]), model.encode_text(model.tokenizer.encode(["a dog"])))


@pytest.mark.parametrize("level", ["attention", "blocks"])
def test_weights_that_are_others_by_the_backward_pass_are_an_error(level: str) -> None:
    """Without checkpoints autograd has kept those of the forward pass, or finds them changed."""
    unet, x, context = tiny_model().unet, torch.ones(1, 4, 8, 8, requires_grad=True), torch.ones(1, 24, 32)
    given = x, torch.tensor([500]), context
    others = {name: 2 * weight for name, weight in unet.state_dict().items()}
    y = torch.func.functional_call(unet, others, given, {"checkpointing": level})
    with pytest.raises(RuntimeError, match="others in their place"):
        y.sum().backward()
    y = unet(*given, checkpointing=level)
    with torch.no_grad():
        unet.middle_block[1].transformer_blocks[0].attn2.to_k.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights were changed"):
        y.sum().backward()
    unet(*given, checkpointing=level).sum().backward()


@pytest.mark.parametrize("level", ["attention", "blocks"])
@pytest.mark.parametrize("first", [False, True])
def test_weights_that_are_frozen_or_unfrozen_in_between_are_an_error(level: str, first: bool) -> None:
    unet, x, context = tiny_model().unet, torch.ones(1, 4, 8, 8, requires_grad=True), torch.ones(1, 24, 32)
    weight = unet.requires_grad_(False).middle_block[1].transformer_blocks[0].attn2.to_k.weight.requires_grad_(first)
    y = unet(x, torch.tensor([500]), context, checkpointing=level)
    weight.requires_grad_(not first)
    with pytest.raises(RuntimeError, match="weights were frozen or unfrozen, between a forward and its backward pass"):
        y.sum().backward()


def with_a_hook(layer: nn.Module) -> Callable[[], object]:
    return layer.register_forward_hook(lambda layer, inputs, y: 0.3 * y).remove


def with_another_forward(layer: nn.Module) -> Callable[[], object]:
    forward = layer.forward
    layer.forward = lambda *inputs: 0.3 * forward(*inputs)
    return lambda: delattr(layer, "forward")


def of_another_class(layer: nn.Module) -> Callable[[], object]:
    forward = Linear.forward
    Linear.forward = lambda self, x: 0.3 * forward(self, x)
    return lambda: setattr(Linear, "forward", forward)


def that_trains(layer: nn.Module) -> Callable[[], object]:
    layer.train()
    return layer.eval


def with_a_hook_of_all(layer: nn.Module) -> Callable[[], object]:
    return register_module_forward_hook(lambda each, inputs, y: 0.3 * y if each is layer else None).remove


@pytest.mark.parametrize("level", ["attention", "blocks"])
@pytest.mark.parametrize(
    "change", [with_a_hook, with_another_forward, of_another_class, with_a_hook_of_all, that_trains]
)
def test_what_is_undone_before_the_backward_pass_is_an_error(level: str, change: Callable[..., Any]) -> None:
    """The second run would be another, and its gradient wrong. With a block around both passes it is right."""
    model, x, t = tiny_model(), numbers(1, 4, 8, 8), torch.tensor([500])
    layer = model.unet.middle_block[1].transformer_blocks[0].attn2.to_v
    context = numbers(1, 24, 32, seed=1).requires_grad_()

    def gradient(level: str, early: bool) -> Tensor:
        model.checkpointing, undo = level, change(layer)
        try:
            y = model.predict(x, t, TextFeatures(context)).square().sum()
            if early:
                undo()
            return torch.autograd.grad(y, context)[0]
        finally:
            if not early:
                undo()

    assert torch.equal(gradient(level, early=False), gradient("none", early=False))
    assert torch.equal(gradient("none", early=True), gradient("none", early=False))
    with pytest.raises(RuntimeError, match="hooks or layers were put in, taken out or replaced"):
        gradient(level, early=True)


class Scaled(nn.Module):
    """A layer's answer times a buffer, which is replaced, or grows in place, by itself or by somebody else."""

    def __init__(self, layer: nn.Module, by_itself: bool) -> None:
        super().__init__()
        self.layer, self.by_itself = layer, by_itself
        self.register_buffer("factor", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.factor.clone()
        if self.by_itself:
            self.factor.mul_(2)
        return y


@pytest.mark.parametrize("level", ["attention", "blocks"])
@pytest.mark.parametrize("how", ["by itself", "in place", "replaced"])
def test_a_buffer_that_changes_before_the_backward_pass_is_an_error(level: str, how: str) -> None:
    unet, x, context = tiny_model().unet, torch.ones(1, 4, 8, 8, requires_grad=True), torch.ones(1, 24, 32)
    block = unet.middle_block[1].transformer_blocks[0]
    block.attn2.to_v = scaled = Scaled(block.attn2.to_v, how == "by itself")
    y = unet(x, torch.tensor([500]), context, checkpointing=level)
    if how == "replaced":
        scaled.factor = torch.ones(1)
    elif how == "in place":
        scaled.factor.mul_(2)
    with pytest.raises(RuntimeError, match="^buffers were changed, as layers that train do to their own"):
        y.sum().backward()


@pytest.mark.parametrize("level", ["attention", "blocks"])
def test_a_layer_that_is_replaced_before_the_backward_pass_is_an_error(level: str) -> None:
    """One of the same class and weights, too."""
    unet, x, context = tiny_model().unet, torch.ones(1, 4, 8, 8, requires_grad=True), torch.ones(1, 24, 32)
    feed_forward = unet.middle_block[1].transformer_blocks[0].ff
    feed_forward.net[1] = nn.Dropout(0.0)
    y = unet(x, torch.tensor([500]), context, checkpointing=level)
    feed_forward.net[1] = nn.Dropout(0.5)
    with pytest.raises(RuntimeError, match="hooks or layers were put in, taken out or replaced"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["padding_mode", "_conv_forward"])
def test_a_convolution_that_is_made_otherwise_in_between_is_an_error(name: str) -> None:
    unet, x, context = tiny_model().unet, torch.ones(1, 4, 8, 8, requires_grad=True), torch.ones(1, 24, 32)
    conv, whole = unet.middle_block[0].in_layers[2], nn.Conv2d._conv_forward
    y = unet(x, torch.tensor([500]), context, checkpointing="blocks")
    setattr(conv, name, "circular" if name == "padding_mode" else lambda *inputs: 2 * whole(conv, *inputs))
    with pytest.raises(RuntimeError, match="hooks or layers were put in, taken out or replaced"):
        y.sum().backward()


@pytest.mark.parametrize("level", ["attention", "blocks"])
def test_a_part_of_torchscript_is_as_good_as_another(level: str) -> None:
    unet, given = tiny_model().unet, (torch.tensor([500]), torch.ones(1, 24, 32))
    x, gap = torch.ones(1, 4, 8, 8, requires_grad=True), torch.jit.trace(nn.Softsign(), torch.ones(1))
    unet.middle_block[0].out_layers[2] = unet.middle_block[1].transformer_blocks[0].ff.net[1] = gap
    found, wanted = (gradients(lambda x, how=how: unet(x, *given, checkpointing=how), x) for how in (level, "none"))
    assert torch.equal(*found, *wanted)


@pytest.mark.parametrize("level", ["none", "attention", "blocks"])
def test_what_a_hook_brings_along_gets_its_gradient_or_an_error(level: str) -> None:
    """A word with a vector a layer of attention (Voynov et al. 2023, P+): all but the first were without a gradient,
    and nothing was said.
    """
    unet, given = tiny_model().unet, (numbers(1, 4, 8, 8), torch.tensor([500]), numbers(1, 24, 32))
    layers = [module.attn2 for module in unet.modules() if hasattr(module, "attn2")]
    contexts = numbers(len(layers), 1, 24, 32).requires_grad_()
    for layer, context in zip(layers, contexts):
        layer.register_forward_pre_hook(lambda _, given, context=context: (given[0], context, given[2]))
    y = unet(*given, checkpointing=level)
    if level == "none":
        (gradient,) = torch.autograd.grad(y.sum(), contexts)
        assert gradient.flatten(1).any(dim=1).all()
    else:
        with pytest.raises(RuntimeError, match=r"reads a tensor \(\d, 1, 24, 32\) that needs a gradient"):
            torch.autograd.grad(y.sum(), contexts)


def test_weights_that_are_made_of_what_learns_are_no_error() -> None:
    """Neither a parametrization, whose parameters are the module's own, nor a computed tensor that is handed over."""
    layer, x = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), numbers(2, 3).requires_grad_()
    sources = [x, *layer.parameters()]
    found = torch.autograd.grad(checkpoint(layer, x, weights=layer.parameters()).sum(), sources)
    assert all(map(torch.equal, found, torch.autograd.grad(layer(x).sum(), sources)))
    start = numbers(3).requires_grad_()
    made = start.exp()
    (found,) = torch.autograd.grad(checkpoint(lambda x: x * made, x, weights=[made]).sum(), start)
    assert torch.equal(found, torch.autograd.grad((x * start.exp()).sum(), start)[0])


@pytest.mark.parametrize("level", ["attention", "blocks"])
def test_a_text_may_be_encoded_in_inference_mode(level: str) -> None:
    model, x, t = tiny_model(), numbers(1, 4, 16, 16).requires_grad_(), torch.tensor([500.0])
    with torch.inference_mode():
        context = numbers(1, 7, model.unet.config.context_dim, seed=1)
    wanted, found = (
        gradients(lambda x, how=how: model.unet(x, t, context, checkpointing=how), x) for how in ("none", level)
    )
    assert torch.equal(wanted[0], found[0])
