import numpy as np
import pytest

from inversion import InversionError, TrainConfig


def test_the_rate_warms_up_and_follows_half_a_cosine() -> None:
    config = TrainConfig(steps=10, warmup=2, learning_rate=1.0)
    assert [round(config.rate(k), 4) for k in range(10)] == [
        0.5, 1.0, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381,
    ]  # fmt: skip


def test_the_rate_can_stay() -> None:
    config = TrainConfig(steps=5, warmup=1, learning_rate=0.3, schedule="constant")
    assert {config.rate(k) for k in range(5)} == {0.3}


def test_a_warm_up_as_long_as_the_training_only_rises() -> None:
    config = TrainConfig(steps=4, warmup=4, learning_rate=1.0)
    assert [config.rate(k) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"batch_size": 0}, {"accumulation": 0}, {"validate_every": 0}, {"validation_pairs": 0},
        {"batch_size": 10**15}, {"batch_size": 2**13, "accumulation": 3},
        {"checkpoint_every": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"clip_norm": -1.0},
        {"steps": 2.5}, {"steps": "3"}, {"batch_size": True}, {"seed": 1.5}, {"learning_rate": True},
        {"learning_rate": "1"}, {"warmup": 0.5}, {"patience": 1.5}, {"steps": 2, "warmup": 3},
        {"warmup": -1}, {"patience": 0}, {"seed": -1}, {"seed": 2**32}, {"schedule": "linear"},
    ],
)  # fmt: skip
def test_numbers_that_cannot_work_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InversionError):
        TrainConfig(**bad)


def test_numbers_of_numpy_s_become_python_s() -> None:
    """What is saved with them can be read by torch's unpickler of weights."""
    config = TrainConfig(steps=np.int64(3), learning_rate=np.float32(0.5), clip_norm=2)
    assert config == TrainConfig(steps=3, learning_rate=0.5, clip_norm=2.0)
    assert [type(value) for value in (config.steps, config.learning_rate, config.clip_norm)] == [int, float, float]
