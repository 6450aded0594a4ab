"""Networks, tokenizers and weights. Knows no diffusion process.

model = models.load("emoji")            # or a hub id, a folder, a single file
models.save(model, "copy", "diffusers")
"""

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.class_hub import load_classifier
from models.class_model import ClassModel
from models.errors import ModelError
from models.glide import GlideModel
from models.glide_hub import load_noisy_clip
from models.latent import LatentModel
from models.loading import load, save
from models.outline import outline
from models.setting import Setting
from models.text import TextFeatures
from models.tokenizer import ClipTokenizer, Tokens

__all__ = [
    "AttentionKind", "Checkpointing", "ClassModel", "ClipTokenizer", "GlideModel", "LatentModel", "ModelError",
    "Setting", "TextFeatures", "Tokens", "load", "load_classifier", "load_noisy_clip", "outline", "save",
]  # fmt: skip
