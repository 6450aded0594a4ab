"""The one exception that this package raises for what a user can put right."""


class ModelError(ValueError):
    """A model, file, tokenizer or request that cannot be served: one sentence says what was found, where,
    and what would do."""


OF_WRONG_KINDS = (AttributeError, TypeError, ValueError, ZeroDivisionError, LookupError, RuntimeError)
"""What comes of values that a file should not hold, when networks are made of them."""
