"""The one base class of everything that `diffusion` refuses."""


class DiffusionError(ValueError):
    """A schedule, time, list of times or sampler option that cannot work; the message says what would."""
