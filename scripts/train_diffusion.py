"""Train a latent diffusion model on captioned images: the UNet and the text transformer together, the VAE frozen.

    python scripts/train_diffusion.py --data data/emoji/captioned --vae runs/vae --output runs/emoji

First the text transformer learns alone, to tell from a caption roughly what the picture looks like. (Stable
Diffusion's comes trained from CLIP. An untrained one learns next to nothing through a UNet that as yet ignores it: the
captions differ in a few of 32 tokens, and the noise in the gradient hides them.) Then both learn to denoise.

Captions are replaced by the empty prompt with a set probability, so that the one network learns the conditional and
the unconditional score and can guide itself (Ho & Salimans 2022). Matrices learn by Muon, the rest by AdamW: from one
checkpoint, 200 steps of it left a training loss of 0.3145 where AdamW alone left 0.3237, at a third more time a step.
The weights that are written are an exponential moving average. Interrupted with Ctrl-C it saves first; with --resume
it continues with the same numbers bit for bit.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from _command import run
from _runs import new_folder, resumed
from _training import Trainer, run_steps
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import models
from diffusion import Schedule
from diffusion.objective import mse, target
from models.latent import LatentModel
from models.presets import family_of
from models.text import ClipText, ClipTextConfig
from models.tokenizer import ClipTokenizer
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.weights import write_safetensors


@dataclass
class Config:
    """data: a folder with captions.jsonl, one {"file", "name", "captions"} a line. vae: the output of train_vae.py.

    text_steps: of the text transformer alone, with 64 captions each. caption_dropout: the probability of the empty
    prompt. dtype: of the networks; masters are float32.
    """

    data: Path
    vae: Path
    output: Path = Path("runs/emoji")
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 3)
    num_res_blocks: int = 1
    attention_resolutions: tuple[int, ...] = (2,)
    head_channels: int = 64
    vocab_size: int = 1500
    context_length: int = 32
    text_width: int = 160
    text_layers: int = 3
    text_heads: int = 5
    text_steps: int = 1500
    caption_dropout: float = 0.1
    steps: int = 12000
    batch_size: int = 32
    learning_rate: float = 1e-3
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    save_every: int = 500
    resume: bool = False


def read_captioned(folder: Path) -> tuple[Tensor, list[dict]]:
    """Images (N, 3, H, W) in [-1, 1] as they lie in the folder, all of one size, and the rows of captions.jsonl."""
    file = folder / "captions.jsonl"
    if not file.is_file():
        raise models.ModelError(f"{folder} has no captions.jsonl: name a folder that make_emoji_data.py wrote")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        forms = {len(row["captions"]) for row in rows if row["file"] and row["name"]}
    except (ValueError, KeyError, TypeError) as error:
        raise models.ModelError(
            f'a line of {file} is not {{"file": "...", "name": "...", "captions": ["..."]}} ({error})'
        ) from error
    if len(forms) != 1 or not min(forms):
        raise models.ModelError(f"{file}: every image needs equally many captions, at least one; found {sorted(forms)}")
    pixels = [np.asarray(Image.open(folder / row["file"]).convert("RGB")) for row in rows]
    if len(sizes := {picture.shape[:2] for picture in pixels}) > 1:
        raise models.ModelError(f"the images of {folder} have different heights and widths, {sorted(sizes)}: use one")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1, rows


def save_training_set(folder: Path, moments: Tensor, rows: list[dict]) -> None:
    """Leave the latents, names and one caption of each training image beside the model, for measure_fidelity.py."""
    g = random.Random(0)
    described = [{"name": row["name"], "caption": g.choice(row["captions"])} for row in rows]
    latents = {"latents": moments.chunk(2, dim=1)[0].half()}
    write_safetensors(folder / "training_latents.safetensors", latents, {"rows": json.dumps(described)})


def load_vae(folder: Path) -> VAE:
    """The autoencoder that train_vae.py left in its output folder."""
    described = json.loads((folder / "config.json").read_text())
    vae = VAE(VAEConfig(**described | {"channel_mult": tuple(described["channel_mult"])}))
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    return vae.eval().requires_grad_(False)


def build(config: Config, tokenizer: ClipTokenizer) -> LatentModel:
    """The untrained model around a trained autoencoder."""
    torch.manual_seed(config.seed)
    vae = load_vae(config.vae)
    latent = vae.config.latent_channels
    unet = UNet(
        UNetConfig(
            latent, latent, config.model_channels, config.channel_mult, config.num_res_blocks,
            config.attention_resolutions, None, config.head_channels, context_dim=config.text_width,
        )
    )  # fmt: skip
    text = ClipText(
        ClipTextConfig(
            tokenizer.vocab_size, config.context_length, config.text_width, config.text_layers, config.text_heads,
            4 * config.text_width,
        )
    )  # fmt: skip
    torch.nn.init.normal_(text.embeddings.token_embedding.weight, std=0.02)     # as CLIP does; the default is 1
    torch.nn.init.normal_(text.embeddings.position_embedding.weight, std=0.01)
    schedule = {"name": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    return LatentModel(
        family=family_of(text.config), unet=unet, vae=vae, text=text, tokenizer=tokenizer, schedule=schedule,
        prediction="v_prediction", resolution=0, source=str(config.output),
    )  # fmt: skip


def teach_text(text: ClipText, ids: Tensor, latents: Tensor, config: Config) -> None:
    """Train the text transformer on captions alone: its mean feature, through a linear head, tells the blurred latent.

    The mean over all positions, because that is what a cross-attention sees that does not know yet where to look.

    text: float32, trained in place. ids: (N, captions, L) tokens of each image's captions. latents: (N, C, h, w).
    Interrupted, it continues from output/text.pt, and does nothing if that is complete.
    """
    blurred = functional.adaptive_avg_pool2d(latents, 8).flatten(1)                            # (N, 64 C)
    head = nn.Linear(text.config.width, blurred.shape[1])
    trainer = Trainer({"text": text.train(), "head": head}, 1e-3, config.text_steps, warmup=50, decay=0.99)
    checkpoint = config.output / "text.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)

    def loss(g: torch.Generator) -> Tensor:
        which = torch.randint(len(ids), (64,), generator=g)
        caption = ids[which, torch.randint(ids.shape[1], (64,), generator=g)]                  # (64, L)
        return (head(text(caption).context.mean(dim=1)) - blurred[which]).pow(2).mean()

    for _ in run_steps(trainer, checkpoint, loss, config, config.save_every):
        pass
    trainer.put(trainer.average)


def is_hidden_matrix(name: str, weight: Tensor) -> bool:
    """Whether a weight maps features to features: no table, and neither the first nor the last layer of the UNet."""
    outermost = name.startswith(("unet.input_blocks.0.", "unet.out."))
    return weight.ndim >= 2 and "embedding" not in name and not outermost


def export(model: LatentModel, trainer: Trainer, folder: Path, dtype: torch.dtype) -> None:
    """Write the model with averaged weights, in float16, and go on training where we were."""
    model.unet.float(), model.text.float()                           # the average is float32, and so rounded once
    trainer.put(trainer.average)
    models.save(model, folder, dtype=torch.float16)
    model.unet.to(dtype), model.text.to(dtype)
    trainer.put(trainer.master)


def main(config: Config) -> None:
    """Train, writing the averaged model to output/model at every save."""
    if config.resume:
        config = resumed(config.output, config)
    else:
        new_folder(config.output, "diffusion", "the same command and --resume")
    images, rows = read_captioned(config.data)
    captions = [row["captions"] for row in rows]
    tokenizer = ClipTokenizer.train(
        (c for several in captions for c in several), config.vocab_size, config.context_length
    )
    model = build(config, tokenizer)
    model.resolution = images.shape[-1]
    latent = model.x0_shape(*images.shape[2:])
    moments = torch.cat([model.moments(batch) for batch in images.split(64)])
    ids = torch.stack([tokenizer.encode(several).ids for several in captions])                 # (N, captions, L)
    empty, schedule = tokenizer.encode([""]).ids, Schedule(**model.schedule)

    checkpoint = config.output / "training.pt"
    if not checkpoint.exists():
        teach_text(model.text, ids, moments.chunk(2, dim=1)[0], config)
    dtype = getattr(torch, config.dtype)
    networks = {"unet": model.unet.to(dtype).train(), "text": model.text.to(dtype).train()}
    trainer = Trainer(networks, config.learning_rate, config.steps, 200, 0.9995, muon=is_hidden_matrix)
    if checkpoint.exists():
        trainer.load(checkpoint)

    def loss(g: torch.Generator) -> Tensor:
        b = config.batch_size
        which = torch.randint(len(moments), (b,), generator=g)
        caption = ids[which, torch.randint(ids.shape[1], (b,), generator=g)]
        caption = torch.where(torch.rand(b, 1, generator=g) < config.caption_dropout, empty, caption)
        noise = torch.randn(2, b, *latent, generator=g)
        x0 = model.draw_x0(moments[which], noise[0])
        t = ((torch.rand(b, generator=g) + torch.arange(b)) * (schedule.steps / b)).long()     # one time a stratum
        x_t = schedule.q_sample(x0, t, noise[1])
        output = model.unet(x_t.to(dtype), t, model.text(caption).context)
        return mse(output, target(schedule, model.prediction, x0, t, noise[1])).mean()

    for step, _ in run_steps(trainer, checkpoint, loss, config, config.save_every):
        if step % config.save_every == 0 or step == config.steps:
            export(model, trainer, config.output / "model", dtype)
    save_training_set(config.output / "model", moments, rows)
    print(f"wrote {config.output / 'model'}")


if __name__ == "__main__":
    run(main)
