"""Train the autoencoder of a latent diffusion model on a folder of images.

    python scripts/train_vae.py --images data/emoji/vae --output runs/vae

L1 distance of pixels and of image gradients (which keeps edges sharp), squared distance in opponent colours, and a
small KL term. The opponent colours are weighted against their variance: without that, lightness comes within a few
hundred steps, blue and orange after a thousand, and green and magenta not within two thousand. Small batches: what is
learned here takes steps. Interrupted with Ctrl-C it saves first; the same command with --resume continues with the same
numbers bit for bit.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from _command import run
from _flags import begun
from _runs import write_json
from _training import Trainer, run_steps
from torch import Tensor

from inversion.images import read_folder
from inversion.training import digest, step_generator
from models.errors import ModelError
from models.vae import VAE, VAEConfig
from models.weights import write_safetensors

# Rows: lightness, blue against orange, green against magenta; orthonormal but for the weights 1, 2 and 4.
OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, 2.0, -1.0]])
OPPONENT *= torch.tensor([1.0, 2.0, 4.0])[:, None] / OPPONENT.norm(dim=1, keepdim=True)


@dataclass
class Config:
    """images: a folder, read with its subfolders. The autoencoder halves the size once per entry after the first.

    kl: weight of the KL divergence to N(0, 1), per latent number. dtype: of the networks; masters are float32.
    """

    images: Path
    output: Path = Path("runs/vae")
    size: int = 64
    latent_channels: int = 4
    channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2, 3)
    num_res_blocks: int = 1
    norm_groups: int = 8
    steps: int = 4000
    batch_size: int = 6
    learning_rate: float = 1e-3
    kl: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    resume: bool = False


def image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, along rows and columns. (B, C, H, W)."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def autoencoder_loss(vae: VAE, images: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Reconstruction of (B, 3, H, W) images in [-1, 1] through a sampled latent, and the latent's divergence."""
    moments = vae.encode(images)
    mean, logvar = moments.float().chunk(2, dim=1)
    recon, images = vae.decode(vae.sample(moments, noise)).float(), images.float()
    l1 = (recon - images).abs().mean()
    squared = torch.einsum("oc,bchw->bohw", OPPONENT, recon - images).pow(2).mean()
    edges = sum((a - b).abs().mean() for a, b in zip(image_gradients(recon), image_gradients(images)))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return l1 + edges + squared + kl_weight * kl


@torch.no_grad()
def standardise(vae: VAE, images: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 over (N, 3, H, W) images; what is decoded stays the same.

    z -> (z - mean) / std goes into the 1x1 convolution that ends the encoder, its inverse into the one that begins the
    decoder. Diffusion noises all channels alike, so a faint one (colours, here) would drown long before the others.
    """
    z = torch.cat([vae.encode(batch).chunk(2, dim=1)[0] for batch in images.split(64)])        # (N, C, h, w)
    std, mean = torch.std_mean(z, dim=(0, 2, 3))                                               # (C,)
    if not (std > 0).all():
        raise ModelError("the latents of all pictures are alike: take more of them, or larger ones")
    inner, outer, c = vae.quant_conv, vae.post_quant_conv, len(mean)
    inner.weight[:c] /= std[:, None, None, None]
    inner.bias[:c] = (inner.bias[:c] - mean) / std
    inner.bias[c:] -= 2 * std.log()                                                            # the log-variances
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= std[None, :, None, None]


def main(config: Config) -> None:
    """Train, then write vae.safetensors and its config.json into the output folder."""
    config = begun(config)
    factor = 2 ** (len(config.channel_mult) - 1)
    if config.size % factor:
        raise ModelError(f"{config.size} pixels cannot be halved as often as this asks: use a multiple of {factor}")
    if uneven := [c for c in (config.channels * mult for mult in config.channel_mult) if c % config.norm_groups]:
        raise ModelError(f"{uneven[0]} channels cannot be divided among {config.norm_groups} groups: see --norm-groups")
    images = read_folder(config.images, config.size, recursive=True).contiguous()
    torch.manual_seed(config.seed)
    shape = {
        k: getattr(config, k) for k in ("latent_channels", "channels", "channel_mult", "num_res_blocks", "norm_groups")
    }
    vae, dtype = VAE(VAEConfig(**shape, scale=1.0)), getattr(torch, config.dtype)
    trainer = Trainer(
        {"vae": vae}, config.learning_rate, config.steps, warmup=100, decay=0.999, dtype=dtype, taught=digest(images)
    )
    checkpoint = config.output / "training.pt"
    trainer.load(checkpoint)

    def loss(g: torch.Generator) -> Tensor:
        batch = images[torch.randint(len(images), (config.batch_size,), generator=g)].to(dtype)
        batch = torch.where(torch.rand(len(batch), 1, 1, 1, generator=g) < 0.5, batch.flip(-1), batch)
        latent = (len(batch), config.latent_channels, config.size // vae.factor, config.size // vae.factor)
        return autoencoder_loss(vae, batch, torch.randn(latent, generator=g).to(dtype), config.kl)

    for _ in run_steps(trainer, checkpoint, loss, config, save_every=250):
        pass
    vae.float()
    trainer.put(trainer.average)
    standardise(vae, images[torch.randperm(len(images), generator=step_generator(config.seed, -1))[:2048]])
    write_safetensors(config.output / "vae.safetensors", vae.state_dict())
    write_json(config.output / "config.json", asdict(vae.config))
    print(f"wrote {config.output}")


if __name__ == "__main__":
    run(main)
