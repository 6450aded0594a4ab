"""Looking up learned words: exact rows, and a gradient for them alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models import ModelError
from models.text import ClipText, ClipTextConfig, token_vectors

TINY = ClipTextConfig(vocab_size=11, length=8, width=12, layers=2, heads=2, mlp_width=24)


@pytest.mark.parametrize("heads", [0, -2, 5])
def test_heads_that_do_not_divide_the_width(heads: int) -> None:
    with pytest.raises(ModelError, match=f"12 wide cannot be divided among {heads} heads"):
        replace(TINY, heads=heads)


def test_ids_beyond_the_table_read_the_extra_rows() -> None:
    table, extra = torch.arange(6.0).view(3, 2), torch.tensor([[10.0, 11.0], [20.0, 21.0]])
    rows = token_vectors(table, torch.tensor([[2, 3, 4, 0]]), extra)
    assert rows.tolist() == [[[4.0, 5.0], [10.0, 11.0], [20.0, 21.0], [0.0, 1.0]]]


def test_an_id_beyond_both_is_an_error() -> None:
    table = torch.zeros(3, 2)
    with pytest.raises(IndexError):
        token_vectors(table, torch.tensor([[3]]), None)
    with pytest.raises(IndexError):
        token_vectors(table, torch.tensor([[5]]), torch.zeros(2, 2))


def test_learned_rows_equal_an_extended_table_and_alone_get_its_gradient() -> None:
    torch.manual_seed(0)
    text = ClipText(TINY).double()
    extended = ClipText(ClipTextConfig(13, 8, 12, 2, 2, 24)).double()
    extra = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    state = text.state_dict() | {
        "embeddings.token_embedding.weight": torch.cat([text.embeddings.token_embedding.weight, extra]).detach()
    }
    extended.load_state_dict(state)
    text.requires_grad_(False)
    ids = torch.tensor([[9, 11, 12, 3, 11, 10, 10, 10]])
    ours, theirs = text(ids, extra=extra).context, extended(ids).context
    assert torch.equal(ours, theirs)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    # the same sums in another order: a few float64 roundings
    torch.testing.assert_close(
        extra.grad, extended.embeddings.token_embedding.weight.grad[11:], rtol=1e-12, atol=1e-12
    )
    assert all(p.grad is None for p in text.parameters())


def test_a_shorter_prompt_is_the_beginning_of_a_longer_one() -> None:
    """Its positions are counted from the first: what is causal cannot know how much follows."""
    torch.manual_seed(0)
    text, ids = ClipText(TINY).double(), torch.tensor([[1, 2, 3, 4, 5, 6]])
    # other sizes of product, a few float64 roundings of numbers of order one
    torch.testing.assert_close(text(ids[:, :3]).context, text(ids).context[:, :3], rtol=0, atol=1e-12)


def test_later_tokens_cannot_change_earlier_features() -> None:
    torch.manual_seed(0)
    text: nn.Module = ClipText(TINY)
    a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
    fa, fb = text(a).context, text(b).context
    assert torch.equal(fa[:, :3], fb[:, :3])
    assert not torch.allclose(fa[:, 3], fb[:, 3])
