"""GLIDE as its users hold it: text in, raw predictions over pixels, images out.

Four networks were published: a base model for 64 pixels, an upsampler from there to 256, and an inpainting form of
each. All are one UNet with one text transformer of its own; they differ in size and in what stands beside the noisy
image in the input channels.

Source: Nichol et al. 2022 (GLIDE); openai/glide-text2im @ 69b5307, text2im_model.py and model_creation.py.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.glide_text import GlideText
from models.glide_tokenizer import GlideTokenizer
from models.offload import Offload, runs_in, visit
from models.pixels import PixelModel
from models.streaming import Window
from models.text import TextFeatures, require_vectors
from models.tokenizer import Tokens
from models.unet import UNet
from models.unet_model import Sampling


@dataclass
class GlideModel(PixelModel):
    """One of GLIDE's networks with its text transformer, and what is needed to use it.

    schedule: keyword arguments of diffusion.Schedule. resolution: side of the images that it was trained on.
    factor: how many times larger its images are than the small ones that it is shown; 1 if it is shown none.
    inpaints: it keeps a part of an image. source: where it is from. prediction: "epsilon", or "v_prediction" of an
    upsampler trained here. upsampler: what enlarges this one's images, if anything does. checkpointing, attention,
    offload, window: see `UNetModel`.

    Raises ModelError for parts that do not fit each other.
    """

    unet: UNet
    text: GlideText
    tokenizer: GlideTokenizer
    schedule: dict[str, Any]
    resolution: int
    factor: int
    inpaints: bool
    source: str
    prediction: str = "epsilon"
    upsampler: "GlideModel | None" = None
    checkpointing: Checkpointing = "none"
    attention: AttentionKind = "auto"
    offload: Offload = "none"
    window: Window | None = None

    def __post_init__(self) -> None:
        unet, text = self.unet.config, self.text.config
        pairs = {
            "the UNet's output channels and twice an image's": (unet.out_channels, 6),
            "the UNet's input channels and what stands in them": (
                unet.in_channels, 3 + 3 * (self.factor > 1) + 4 * self.inpaints,
            ),
            "the UNet's context and the text's width": (unet.context_dim, text.width),
            "the UNet's time embedding and the pooled text": (4 * unet.model_channels, text.pooled_dim),
            "the tokenizer's vocabulary and the text's": (self.tokenizer.vocab_size, text.vocab_size),
            "the tokenizer's length and the text's": (self.tokenizer.length, text.length),
        }  # fmt: skip
        self.require_fit(pairs | self.upsampler_pairs())

    @property
    def family(self) -> str:
        """ "glide", the embedded model's "emoji-glide", or "custom-glide": the text transformer's width tells."""
        return {512: "glide", 160: "emoji-glide"}.get(self.width, "custom-glide")

    @property
    def sampling(self) -> Sampling:
        """What suits it when images are drawn: the numbers of OpenAI's notebooks, of which inpainting has its own."""
        if self.factor > 1:
            return Sampling("ddpm" if self.inpaints else "ddim", "fast27", 1.0, noise=0.997)
        return Sampling("ddpm", "100", 5.0 if self.inpaints else 3.0)

    @property
    def width(self) -> int:
        """D, the size of a token's vector."""
        return self.text.config.width

    def embedding(self, token: int) -> Tensor:
        """(D,) float32: the vector of an existing token, a copy."""
        return self.text.token_embedding.weight[token].detach().to(runs_in(self.text)).float().clone()

    def encode_text(self, tokens: Tokens, extra: Tensor | None = None) -> TextFeatures:
        """Features of tokenised prompts: context (B, L, D) and pooled (B, E), in the network's dtype.

        extra: (n, D) float32, the vectors for ids from vocab_size on; gradients reach them. Raises ModelError for fewer
        than the prompts read, and of another width.
        """
        require_vectors(self.text.token_embedding.weight, tokens.ids, extra)
        extra = None if extra is None else extra.to(self.device)
        return TextFeatures(*visit(self, self.text, tokens.ids.to(self.device), tokens.mask.to(self.device), extra))
