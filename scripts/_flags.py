"""The flags of a training of networks: those of an interrupted run, and what none can have."""

import math
from typing import Any

from _command import named
from _runs import new_folder, resumed

from models import ModelError


def begun(config: Any) -> Any:
    """The flags of a run, which are those of the interrupted one with --resume.

    Raises ModelError for flags that no training can have, and InversionError if there is no such run, or something lies
    where a new one would.
    """
    _require_sense(config)
    if config.resume:
        return resumed(config.output, config, named=named())
    new_folder(config.output, "training", "the same command and --resume")
    return config


def _require_sense(config: Any) -> None:
    """Raise ModelError for flags of a training that no training can have; config: a script's flags."""
    least = {"steps": 1, "batch_size": 1, "text_steps": 0, "save_every": 1, "size": 1, "seed": 0, "vocab_size": 1}
    least |= {"model_channels": 1, "head_channels": 1, "norm_groups": 1, "num_res_blocks": 1}
    least |= {"text_width": 1, "text_layers": 1, "text_heads": 1, "context_length": 3}
    least |= {"channels": 1, "latent_channels": 1, "kl": 0}
    for name, minimum in least.items():
        value = getattr(config, name, None)
        if value is not None and not value >= minimum:                       # nan is not
            raise ModelError(f"--{name.replace('_', '-')} must be at least {minimum}, not {value}")
    if config.seed >= 2**32:
        raise ModelError(f"--seed lies between 0 and {2**32 - 1}, {config.seed} does not")
    if not config.channel_mult or not all(mult > 0 for mult in config.channel_mult):
        raise ModelError(f"--channel-mult are numbers above 0, at least one, not {config.channel_mult}")
    factors, attends = [2**i for i in range(len(config.channel_mult))], getattr(config, "attention_resolutions", ())
    if not set(attends) <= set(factors):
        known = ", ".join(map(str, factors))
        raise ModelError(f"--attention-resolutions are among {known} with these --channel-mult, not {attends}")
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise ModelError(f"--learning-rate must be a number above 0, not {config.learning_rate}")
    if not 0 <= getattr(config, "caption_dropout", 0) <= 1:
        raise ModelError(f"--caption-dropout is a probability, 0 to 1, not {config.caption_dropout}")
