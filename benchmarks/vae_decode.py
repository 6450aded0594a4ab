"""Stable Diffusion's latents to an image of 512x512, in bfloat16: `LatentModel.decode` and diffusers' AutoencoderKL.

    python benchmarks/vae_decode.py [--json FILE]
"""

from collections.abc import Iterator
from typing import Any

import torch
from _measure import command, compare
from _networks import Peer, ours, peer
from _process import Side, Step, Work

from models import LatentModel

WORKS = [Work("vae_decode", "bfloat16", 512)]


def start_ours(model: LatentModel, work: Work) -> Step:
    """Decoding the same latents again and again."""
    x0 = torch.randn(1, *model.x0_shape(work.resolution, work.resolution))
    return lambda: model.decode(x0)


def start_peer(networks: Peer, work: Work) -> Step:
    """The same as the pipeline does it: scaled back, decoded, clamped."""
    vae = networks.vae
    side = work.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    x0 = torch.randn(1, vae.config.latent_channels, side, side, dtype=vae.dtype)
    return torch.no_grad()(lambda: vae.decode(x0 / vae.config.scaling_factor).sample.float().clamp(-1, 1))


def measure() -> Iterator[dict[str, Any]]:
    """The rows of WORKS."""
    for work in WORKS:
        yield from compare([work], Side(ours, start_ours), Side(peer, start_peer), rounds=5)


if __name__ == "__main__":
    command(__doc__, measure)
