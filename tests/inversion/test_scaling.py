"""Loss scaling: nothing is rounded by it, and what overflows is passed over with half the scale."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from inversion import Concept, InversionError, Training
from inversion.scaling import GROWS_AFTER, LARGEST, START, after_overflow, after_updates, first_scale
from inversion.state import State
from models import TextFeatures
from tests.inversion.test_training import FAST, TEMPLATES, Sum, images, learn


class Half(Sum):
    """Says that it is in float16; at some calls a gradient of 4 or more, scaled, is more than it can hold."""

    dtype = torch.float16

    def __init__(self, narrow: range = range(0)) -> None:
        super().__init__()
        self.narrow = narrow

    def predict(self, x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        answer = super().predict(x_t, t, features).clone()
        if self.calls in self.narrow and answer.requires_grad:
            answer.register_hook(lambda g: torch.where(g.abs().max() * 2**7 > 2**13, torch.inf, g))
        return answer


def training(model: Any) -> Training:
    return Training(model, Concept.from_text(model, "<x>", "dog"), images(), TEMPLATES, FAST)


def test_only_float16_is_scaled() -> None:
    assert [first_scale(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)] == [START, None, None]
    assert first_scale(torch.float32, torch.float16) == START               # a text transformer in its file's own dtype
    assert (training(Half()).state.scale, training(Sum()).state.scale) == (START, None)


def test_the_gradient_is_the_same_to_the_bit() -> None:
    """A power of two changes no digit."""
    run = training(Sum())
    (loss, plain), *others = (run._gradient(replace(run.state, scale=scale)) for scale in (None, 2.0, START, LARGEST))
    for other_loss, scaled in others:
        assert other_loss == loss
        assert torch.equal(scaled, plain)


def test_a_small_gradient_survives_float16() -> None:
    model = Half()
    answer = model.predict

    def narrow(x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        y = answer(x_t, t, features).clone()
        y.register_hook(lambda g: g.half().float())          # what a network in float16 would hand back
        return y * 1e-8

    model.predict = narrow
    run = training(model)
    assert not run._gradient(replace(run.state, scale=None))[1].any()
    assert run._gradient(run.state)[1].all()


def test_an_overflow_halves_the_scale_and_moves_nothing() -> None:
    state = State.start(torch.ones(1, 4), START)
    after = state.passed_over().passed_over()
    assert (after.scale, after.skipped, after.in_a_row) == (START / 4, 2, 2)
    assert torch.equal(after.vectors, state.vectors)
    assert State.start(torch.ones(1, 4)).passed_over().scale is None
    assert after_overflow(1.0) == 1.0


def test_the_scale_grows_after_many_updates_and_an_overflow_begins_the_count_anew() -> None:
    state = replace(State.start(torch.ones(1, 4), 8.0), clean=GROWS_AFTER - 2)
    state = state.updated(torch.ones(1, 4), 1e-3, 1.0)
    assert (state.scale, state.clean) == (8.0, GROWS_AFTER - 1)
    grown = state.updated(torch.ones(1, 4), 1e-3, 1.0)
    assert (grown.scale, grown.clean) == (16.0, 0)
    assert state.passed_over().clean == 0
    assert after_updates(LARGEST, GROWS_AFTER)[0] == LARGEST
    assert after_updates(None, GROWS_AFTER) == (None, GROWS_AFTER)


def test_a_training_goes_on_with_a_smaller_scale() -> None:
    """Two calls validate the start; at the third and fourth the scale is too large for the gradient."""
    result = learn(Half(range(3, 5)), replace(FAST, steps=6))
    assert result.metrics["skipped_steps"] == 2
    assert result.concept.vectors.isfinite().all()


def test_overflows_in_a_row_end_a_training() -> None:
    model = Half(range(3, 1000))
    answer = model.predict

    def always(x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        y = answer(x_t, t, features)
        if y.requires_grad:
            y.register_hook(lambda g: g * torch.inf)
        return y

    model.predict = always
    with pytest.raises(InversionError, match=r"not finite in 10 steps in a row, to step 10: .*float16"):
        learn(model, replace(FAST, steps=20))
