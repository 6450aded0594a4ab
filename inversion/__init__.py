"""Learns a word from a few images: textual inversion.

model = models.load("emoji")
concept = Concept.from_text(model, "<poodle>", "dog")
files = find_images("photos")
templates = templates_for(files, TEMPLATES["emoji"], concept.placeholder)
result = train(model, concept, read_images(files, model.resolution), templates)
result.concept.save("poodle.safetensors")
"""

from inversion.choice import Planned, fastest, settings_for
from inversion.concept import Concept
from inversion.config import TrainConfig
from inversion.errors import InversionError
from inversion.images import find_images, read_folder, read_images
from inversion.plan import drawing, plan
from inversion.prompts import TEMPLATES, check_prompts, read_templates, templates_for
from inversion.trainer import Result, state_file, train
from inversion.training import StepReport, Training

__all__ = [
    "TEMPLATES",
    "Concept",
    "InversionError",
    "Planned",
    "Result",
    "StepReport",
    "TrainConfig",
    "Training",
    "check_prompts",
    "drawing",
    "fastest",
    "find_images",
    "plan",
    "read_folder",
    "read_images",
    "read_templates",
    "settings_for",
    "state_file",
    "templates_for",
    "train",
]
