from pathlib import Path
from typing import Any

import pytest
import torch

from inversion import InversionError
from inversion.state import State
from tests.disk import full_disk


def test_the_update_is_adamw_without_weight_decay() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 8)
    weight = start.clone().requires_grad_()
    peer = torch.optim.AdamW([weight], lr=0.0, weight_decay=0.0)
    state = State.start(start)
    for k in range(50):
        gradient, rate = torch.randn(3, 8) * 10.0 ** (k % 7 - 3), 1e-2 / (k + 1)
        weight.grad, peer.param_groups[0]["lr"] = gradient.clone(), rate
        peer.step()
        state = state.updated(gradient, rate, 0.0)
    # the same formula with the factors in another order: float32 rounding of fifty updates of at most 1e-2
    assert (state.vectors - weight).abs().max() < 2e-6
    assert (state.vectors - start).abs().max() > 1e-2
    assert (state.step, state.updates) == (50, 50)


def test_no_weight_decays() -> None:
    state = State.start(torch.ones(1, 4))
    for _ in range(10):
        state = state.updated(torch.zeros(1, 4), 1.0, 0.0)
    assert torch.equal(state.vectors, torch.ones(1, 4))


def test_a_step_leaves_the_state_before_it_as_it_was() -> None:
    state = State.start(torch.ones(1, 4))
    after = state.updated(torch.ones(1, 4), 0.1, 1.0).validated(1.0, {})
    assert torch.equal(state.vectors, torch.ones(1, 4))
    assert torch.equal(state.best, torch.ones(1, 4))
    assert not torch.equal(after.best, state.best)


def test_start_copies_its_vectors() -> None:
    vectors = torch.ones(1, 4)
    state = State.start(vectors)
    vectors.zero_()
    assert torch.equal(state.vectors, torch.ones(1, 4))


def test_a_step_passed_over_changes_nothing_but_the_counts() -> None:
    state = State.start(torch.ones(1, 4)).updated(torch.ones(1, 4), 0.1, 1.0)
    after = state.passed_over().passed_over()
    for name in ("vectors", "mean", "square", "updates"):
        assert torch.equal(torch.as_tensor(getattr(after, name)), torch.as_tensor(getattr(state, name)))
    assert (after.step, after.skipped, after.in_a_row) == (3, 2, 2)
    moved, plain = (each.updated(torch.full((1, 4), 0.5), 0.1, 1.0) for each in (after, state))
    assert torch.equal(moved.vectors, plain.vectors)                    # Adam's k counts updates, not steps
    assert (moved.in_a_row, moved.updates) == (0, 2)


def test_the_best_is_kept_not_the_last() -> None:
    state = State.start(torch.zeros(1, 4))
    for loss in (3.0, 1.0, 2.0, float("nan")):
        state = state.updated(torch.ones(1, 4), 0.1, loss).validated(loss, {"loss": loss})
        if loss == 1.0:
            best = state.vectors
    assert torch.equal(state.best, best)
    assert (state.best_loss, state.best_step, len(state.history)) == (1.0, 2, 4)


def test_the_best_is_met_at_a_step_not_at_an_update() -> None:
    state = State.start(torch.zeros(1, 4)).passed_over().updated(torch.ones(1, 4), 0.1, 1.0).validated(1.0, {})
    assert (state.best_step, state.updates) == (2, 1)


def test_progress_is_more_than_a_tenth_of_a_percent() -> None:
    state = State.start(torch.zeros(1, 4))
    for loss, stale in ((1.0, 0), (0.9995, 1), (0.9991, 2), (0.9985, 0), (2.0, 1)):
        state = state.validated(loss, {})
        assert state.stale == stale
    assert state.best_loss == 0.9985


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    state = State.start(torch.randn(2, 4)).updated(torch.randn(2, 4), 0.1, 1 / 3).passed_over()
    state = state.validated(0.1, {"step": 2, "norms": [1.0, 2.0]})
    state.save(tmp_path / "a" / "s.pt", {"seed": 1})
    again = State.load(tmp_path / "a" / "s.pt", {"seed": 1}, torch.Size([2, 4]))
    for name, value in vars(state).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else repr(value) == repr(other)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["s.pt"]


@pytest.mark.parametrize("room", [0, 100, 5_000, 100_000, 162_000])    # of 162.5 kB: wherever it tears
def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_state_before(tmp_path: Path, room: int) -> None:
    State.start(torch.zeros(1, 4)).save(tmp_path / "s.pt", {"seed": 1})
    with full_disk(room), pytest.raises(OSError, match=r"[Ff]ile .*s\.pt"):
        State.start(torch.zeros(100, 100)).save(tmp_path / "s.pt", {"seed": 1})
    assert State.load(tmp_path / "s.pt", {"seed": 1}, torch.Size([1, 4])).step == 0
    assert [file.name for file in tmp_path.iterdir()] == ["s.pt"]


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    State.start(torch.zeros(1, 4)).save(tmp_path / "s.pt", {"seed": 1, "steps": 3})
    with pytest.raises(InversionError, match="belongs to another run: its seed is 1, not 2"):
        State.load(tmp_path / "s.pt", {"seed": 2, "steps": 3}, torch.Size([1, 4]))
    with pytest.raises(InversionError, match="belongs to another run: its steps is 3, not None"):
        State.load(tmp_path / "s.pt", {"seed": 1}, torch.Size([1, 4]))
    with pytest.raises(InversionError, match="belongs to another run: its images is None, not 5"):
        State.load(tmp_path / "s.pt", {"seed": 1, "steps": 3, "images": 5}, torch.Size([1, 4]))


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InversionError, match="there is no training to resume"):
        State.load(tmp_path / "s.pt", {}, torch.Size([1, 4]))
    (tmp_path / "s.pt").write_bytes(b"half")
    with pytest.raises(InversionError, match="is damaged and cannot be resumed"):
        State.load(tmp_path / "s.pt", {}, torch.Size([1, 4]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"vectors": torch.zeros(2, 4)}, {"vectors": "x"}, {"mean": None}, {"best": torch.zeros(1, 4).double()},
        {"vectors": torch.full((1, 4), torch.nan)}, {"step": "3"}, {"step": 3}, {"losses": [1.0]}, {"more": 1},
        {"mean": torch.full((1, 4), torch.nan)}, {"square": torch.full((1, 4), -1.0)}, {"updates": 1}, {"scale": "a"},
        {"history": (1,)}, {"updates": -1}, {"best": torch.full((1, 4), torch.nan)},
    ],
)  # fmt: skip
def test_a_state_that_cannot_be(tmp_path: Path, wrong: dict[str, Any]) -> None:
    State.start(torch.zeros(1, 4)).save(tmp_path / "s.pt", {})
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    torch.save(content | {"state": content["state"] | wrong}, tmp_path / "s.pt")
    with pytest.raises(InversionError, match="is damaged and cannot be resumed"):
        State.load(tmp_path / "s.pt", {}, torch.Size([1, 4]))
