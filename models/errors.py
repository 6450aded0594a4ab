"""The one exception that this package raises for what a user can put right."""


class ModelError(ValueError):
    """A model, file, tokenizer or request that cannot be served: one sentence says what was found, where,
    and what would do."""
