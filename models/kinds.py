"""Which of the published kinds a file of tensors is: their names tell. A kind is what a sentence calls it."""

import re
from collections.abc import Iterable

STABLE_DIFFUSION = "a Stable Diffusion checkpoint"
GLIDE = "one of GLIDE's networks"
GUIDED_DIFFUSION = "a UNet of guided-diffusion"
CLASSIFIER = "a classifier of guided-diffusion"
UNKNOWN = "a file of no kind that is known here"
WORD = "a learned word, which is used beside a model"
# What else people have: names in it, matched from their start, and what it is. The first that fits is it.
TRANSFORMER = r"(model\.diffusion_model\.)?(double|joint)_blocks\.", "a transformer of Stable Diffusion 3 or Flux"
OTHERS = (
    (r"lora_(unet|te)|.*[._]lora(_[AB])?\.|.*\.(lora|hada|lokr)_", "a LoRA, which changes a model and is none"),
    (r"control_model\.|controlnet_", "a ControlNet, which steers a model and is none"),
    (r"(first_stage_model\.)?(en|de)coder\.(conv_in|mid)", "a VAE alone"),
    (r"(cond_stage_model\..*)?text_model\.", "a text encoder alone"),
    (r"middle_block\.1\.transformer_blocks\.|(down_blocks|mid_block)\.", "a UNet alone, or what changes one"),
    (r"(emb_params|clip_[lg]|<.+>)$", WORD),
)

STEM = "input_blocks.0.0.weight"
GLIDE_TEXT = {"padding_embedding", "transformer_proj.weight"}


def kind_of(names: Iterable[str]) -> str:
    """The kind of a file whose tensors have these names."""
    names = set(names)
    if _any(TRANSFORMER[0], names):
        return TRANSFORMER[1]
    if any(name.startswith("model.diffusion_model.") for name in names):
        return STABLE_DIFFUSION
    if words := next((words for pattern, words in OTHERS if _any(pattern, names)), None):
        return words
    if STEM not in names:
        return UNKNOWN
    if names >= GLIDE_TEXT:
        return GLIDE
    return GUIDED_DIFFUSION if any(name.startswith("output_blocks.") for name in names) else CLASSIFIER


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(re.match(pattern, name) for name in names)
