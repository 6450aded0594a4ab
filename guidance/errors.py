"""The one base class of everything that `guidance` refuses."""


class GuidanceError(ValueError):
    """A prompt, image, size or option that no image can be made with; the message says what would do."""
