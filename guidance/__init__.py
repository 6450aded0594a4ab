"""Guidance: denoisers around denoisers, and prompts to images."""

from guidance.classifier_free import bind, classifier_free, classifier_free_pair
from guidance.errors import GuidanceError
from guidance.generate import generate
from guidance.gradient import classifier, clip_gradient, gradient_of, with_gradient

__all__ = [
    "GuidanceError", "bind", "classifier", "classifier_free", "classifier_free_pair", "clip_gradient", "generate",
    "gradient_of", "with_gradient",
]  # fmt: skip
