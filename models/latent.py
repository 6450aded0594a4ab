"""A latent diffusion model as its users hold it: text in, raw predictions over latents, images out.

It knows no process: the schedule is a handful of keyword arguments for `diffusion.Schedule`, and `predict`
answers with what the network says, epsilon or v, as `prediction` names it. Each network runs in its own
dtype; what goes between them and out is float32 (float64 stays float64).
"""

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.attend import AttentionKind
from models.checkpointing import Checkpointing
from models.errors import ModelError
from models.offload import Offload, present, runs_in, visit
from models.streaming import Window
from models.text import ClipText, TextFeatures, require_vectors
from models.tokenizer import ClipTokenizer, Tokens
from models.unet import UNet
from models.unet_model import Sampling, UNetModel, at_least_float32, require_floats
from models.vae import VAE
from models.weights import on_meta

SAMPLING = {"emoji": Sampling("ddim", 30, 5.0)}
PIXELS = 512 * 512      # of images that the autoencoder sees at once
STABLE_DIFFUSION = Sampling("ddim", 50, 7.5)


@dataclass
class LatentModel(UNetModel):
    """The networks of a latent diffusion model and what is needed to use them.

    family: "sd1", "sd2", or another name. schedule: keyword arguments of diffusion.Schedule. prediction:
    "epsilon" or "v_prediction". resolution: side of the square images that it was trained on, in pixels.
    source: where it is from.
    names, kept: how the loaded file named its tensors, and those of them that no network uses, for `save`.
    shares: `predict` takes one x_t for several prompts, and computes once what comes before the first is read; False,
    for hooks that are to see all in every layer, lets guidance ask for all.
    checkpointing, attention, offload, window: see `UNetModel`. released: the VAE has left for good.

    Raises ModelError for parts that do not fit each other.
    """

    family: str
    unet: UNet
    vae: VAE
    text: ClipText
    tokenizer: ClipTokenizer
    schedule: dict[str, Any]
    prediction: str
    resolution: int
    source: str
    pixels: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    factor: ClassVar[int] = 1
    upsampler: ClassVar[None] = None
    names: dict[str, str] = field(default_factory=dict)
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    checkpointing: Checkpointing = "none"
    attention: AttentionKind = "auto"
    offload: Offload = "none"
    window: Window | None = None
    released: bool = False

    def __post_init__(self) -> None:
        unet, text, latents = self.unet.config, self.text.config, self.vae.config.latent_channels
        pairs = {
            "the UNet's output channels and the VAE's latent channels": (unet.out_channels, latents),
            "the UNet's input channels (more in inpainting models) and the VAE's latent channels": (
                unet.in_channels, latents,
            ),
            "the VAE's channels and an image's": (self.vae.config.in_channels, 3),
            "the UNet's context and the text's width": (unet.context_dim, text.width),
            "the tokenizer's vocabulary and the text's": (self.tokenizer.vocab_size, text.vocab_size),
            "the tokenizer's length and the text's": (self.tokenizer.length, text.length),
        }  # fmt: skip
        self.require_fit(pairs)

    @property
    def width(self) -> int:
        """D, the size of a token's vector."""
        return self.text.config.width

    @property
    def sampling(self) -> Sampling:
        """What suits its family when images are drawn."""
        return SAMPLING.get(self.family, STABLE_DIFFUSION)

    def embedding(self, token: int) -> Tensor:
        """(D,) float32: the vector of an existing token, a copy."""
        return self.text.embeddings.token_embedding.weight[token].detach().to(runs_in(self.text)).float().clone()

    def encode_text(self, tokens: Tokens, extra: Tensor | None = None) -> TextFeatures:
        """Features of tokenised prompts: context (B, L, D) in the text network's dtype.

        extra: (n, D) float32, the vectors for ids from vocab_size on; gradients reach them. Raises ModelError for fewer
        than the prompts read, and of another width.
        """
        require_vectors(self.text.embeddings.token_embedding.weight, tokens.ids, extra)
        extra = None if extra is None else extra.to(self.device)
        return TextFeatures(*visit(self, self.text, tokens.ids.to(self.device), extra))

    def predict(self, x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        """The UNet's raw answer (B, C, h, w), float32, to latents x_t (B, C, h, w) at times t (B,).

        Or x_t and t are b, and the features those of B = k b prompts, of which every b are told of the same x_t.
        Raises ModelError unless there are as many times as x_t.
        """
        return self.answer(x_t, t, features)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], sides multiples of `vae.factor` -> (B, 2C, h, w): mean, log-variance.

        No gradient goes through here, nor through `decode`: through `vae.encode` and `vae.decode` it does. Raises
        ModelError for whole numbers, for sides that the VAE cannot halve, of which it would leave the last pixels out,
        and once the VAE was released.
        """
        self._require_vae()
        require_floats(images)
        self.require_size(*images.shape[2:], self.vae.factor)
        with present(self, self.vae):
            weight = self.vae.quant_conv.weight
            return torch.cat([at_least_float32(self.vae.encode(some.to(weight))) for some in self._at_once(images, 1)])

    def draw_x0(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments (B, 2C, h, w) and noise (B, C, h, w) ~ N(0, 1) -> scaled latents (B, C, h, w), float32."""
        return at_least_float32(self.vae.sample(moments, noise))

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W), float32, clamped to [-1, 1].

        No gradient goes through it, as through `moments`. Raises ModelError once the VAE was released.
        """
        self._require_vae()
        with present(self, self.vae):
            weight, parts = self.vae.quant_conv.weight, self._at_once(x0, self.vae.factor)
            images = torch.cat([self._decoded(some.to(weight)) for some in parts])
        return images.clamp(-1.0, 1.0)

    def x0_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latents. Raises ModelError for a size that the networks cannot halve."""
        self.require_size(height, width, self.vae.factor * self.unet.config.factor)
        return self.vae.config.latent_channels, height // self.vae.factor, width // self.vae.factor

    def release_encoder(self) -> None:
        """Let the VAE's weights leave memory; `moments` and `decode` raise ModelError from then on."""
        self.vae, self.released = on_meta(lambda: VAE(self.vae.config)), True

    def _decoded(self, x0: Tensor) -> Tensor:
        """Some autoencoders leave float16's range, those of several fine-tuned models for example: in float32 then."""
        images = self.vae.decode(x0)
        if images.dtype == torch.float16 and not (images.is_meta or images.isfinite().all()):   # a plan's have none
            images = copy.deepcopy(self.vae).float().decode(x0.float())
        return at_least_float32(images)

    def _at_once(self, x: Tensor, factor: int) -> tuple[Tensor, ...]:
        """Maps, whose images are `factor` times as large, in batches of PIXELS or of one: an autoencoder widens them so
        much that a batch of large ones would need more memory than all else.
        """
        return x.split(max(1, PIXELS // max(1, x.shape[2] * x.shape[3] * factor**2)))

    def _require_vae(self) -> None:
        if self.released:
            raise ModelError(
                "the VAE was released from memory (release_encoder), as in training unless keep_encoder is given: "
                "load the model again to use it"
            )
