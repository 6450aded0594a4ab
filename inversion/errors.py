"""The one base class of everything that `inversion` refuses."""


class InversionError(ValueError):
    """A concept, image folder, template or training that cannot work: one sentence says what was found,
    where, and what would do."""
