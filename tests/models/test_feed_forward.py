"""A transformer's feed-forward: where nothing is recorded it goes through its tokens in parts, and adds in place."""

import pytest
import torch
from torch import Tensor, nn

from models import transformer
from models.attention import SpatialTransformer
from models.condition import Condition
from models.transformer import FeedForward, TransformerBlock
from tests.tiny import randomise


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def block() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = TransformerBlock(32, 24, heads=4)
        randomise(made)
    return made.double().requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 7, 100])     # of eighteen tokens
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_parts_it_is_what_is_recorded(
    rows: int, mode: type, block: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "PART_BYTES", 1)
    monkeypatch.setattr(transformer, "PART_ROWS", rows)
    x, context = numbers(2, 9, 32, seed=1), numbers(2, 5, 24, seed=2)
    recorded = block(x.clone().requires_grad_(), Condition(torch.zeros(2, 1), context))
    widened, widen, before = [], FeedForward.all_but_the_last, x.clone()

    def counted(self: FeedForward, x: Tensor) -> Tensor:
        widened.append(x[..., 0].numel())
        return widen(self, x)

    monkeypatch.setattr(FeedForward, "all_but_the_last", counted)
    with mode():
        found = block(x, Condition(torch.zeros(2, 1), context))
    # three layers in float64, whose rounding is 2e-16
    torch.testing.assert_close(found, recorded, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)
    assert sum(widened) == 18
    assert max(widened) == min(rows, 18)


def test_tokens_that_would_be_copied_are_refused(block: nn.Module) -> None:
    """What is added to a copy would be lost."""
    with torch.no_grad(), pytest.raises(RuntimeError, match="view"):
        block.ff.add_in_parts(numbers(9, 2, 32, seed=1).transpose(0, 1), block.norm3)


class Twice(nn.Module):
    """A layer of the reader's own around one of ours."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@torch.no_grad()
def test_who_listens_sees_no_part_and_another_layer_is_called(
    block: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "PART_BYTES", 1)
    monkeypatch.setattr(transformer, "PART_ROWS", 7)
    x, cond, seen = numbers(2, 9, 32, seed=1), Condition(torch.zeros(2, 1), numbers(2, 5, 24, seed=2)), []
    alone = block(x, cond)
    heard = block.ff.net[0].register_forward_hook(lambda layer, inputs, y: seen.append(y.shape))
    torch.testing.assert_close(block(x, cond), alone, rtol=1e-12, atol=1e-12)                  # as above
    assert seen == [(2, 9, 128)]
    heard.remove()
    block.ff.net[0] = Twice(block.ff.net[0])
    block.ff.net[2].weight *= 0.5
    torch.testing.assert_close(block(x, cond), alone, rtol=1e-12, atol=1e-12)


def test_a_block_in_the_place_of_ours_is_called(block: nn.Module) -> None:
    class Told(nn.Module):
        def forward(self, x: Tensor, cond: Condition) -> Tensor:
            return block(x, cond)

    class Derived(TransformerBlock):
        def forward(self, x: Tensor, cond: Condition) -> Tensor:
            return block(x, cond)

    transformer = SpatialTransformer(32, 24, 4, 8, 1, linear_proj=True).double()
    randomise(transformer)
    x, cond = numbers(2, 32, 3, 3, seed=1), Condition(torch.zeros(2, 1), numbers(2, 5, 24, seed=2))
    transformer.transformer_blocks[0] = block
    wanted = transformer(x, cond)
    for other in (Told(), Derived(32, 24, 4).double()):
        transformer.transformer_blocks[0] = other
        torch.testing.assert_close(transformer(x, cond), wanted, rtol=1e-12, atol=1e-12)       # as above


def test_what_the_branch_before_returns_may_lie_otherwise(block: nn.Module) -> None:
    x, context = numbers(2, 9, 32, seed=1), numbers(2, 5, 24, seed=2)
    with torch.no_grad():
        wanted = block(x, Condition(x[:, 0], context))
        turn = block.attn2.to_out[0].register_forward_hook(lambda *seen: seen[2].mT.contiguous().mT)
        found = block(x, Condition(x[:, 0], context))
    turn.remove()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)           # float64's rounding
