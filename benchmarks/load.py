"""Stable Diffusion 1.5 from a folder to the end of the first guided step: `models.load` against diffusers' pipeline.

    python benchmarks/load.py [--json FILE]

Networks of the real size with random weights are saved by diffusers, in float32, to a temporary folder (4.3 GB). Then
every measurement is a new process, its imports done: it loads the folder, in float32 or converted to bfloat16, encodes
two prompts and takes a guided step of 512x512. Files that were just written are in the system's cache, for both sides.
There are no weights in place when this begins, so here the bytes are all that the process's peak rose by.

In the mode `low_memory` ours streams the UNet's layers and lets the text transformer go (`offload="stream"`), and the
peer is that of `plain`, run once a round for both: its pipeline has no setting that needs less memory here without
taking several times as long.

`load_all` loads, and then reads every weight once, as any use does to those that it needs; a memory map costs nothing
before it is read. Exits 1 if that takes more than 1.2 times the weights of our side, or if the two sides' x after the
first step in float32 differ by more than 1e-4 of the peer's largest value.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import command, compare_cold
from _networks import peer as build_peer
from _process import PartFailed, Process, Side, Sides, Step, Work
from guided_step import PROMPT, peer_scheduler, peer_step
from guided_step import start_ours as start_step

import models
from models.presets import SD1, Preset, untrained

ALLOWED_GROWTH, ALLOWED_ERROR = 1.2, 1e-4
DTYPES = "float32", "bfloat16"
WORKS = [                               # what is held beside one run of the peer's, and how many times it is measured
    *(([Work("load", dtype, 512, mode) for mode in ("plain", "low_memory")], 3) for dtype in DTYPES),
    *(([Work("load_all", dtype, 512)], 1) for dtype in DTYPES),
]
THRIFTY = {"offload": "stream", "checkpointing": "blocks"}


def write(work: Work, folder: Path, preset: Preset = SD1) -> None:
    """Save the networks as diffusers saves a pipeline."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    unet, vae, text, tokenizer = build_peer(work, preset)
    tokenizer.save(folder / "tokenizer")
    StableDiffusionPipeline(
        vae, text, CLIPTokenizer.from_pretrained(folder / "tokenizer"), unet, peer_scheduler(), None, None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def imports(work: Work) -> None:
    """What is loaded once, whatever the model: libraries, and torch's threads."""
    import safetensors.torch  # noqa: F401

    torch.ones(64, 64) @ torch.ones(64, 64)


def start_ours(built: None, work: Work, folder: Path) -> Step:
    """Load, and a step; the step's result stays in the folder."""

    def step() -> None:
        model = models.load(folder, dtype=work.dtype, device="cpu", **(THRIFTY if work.mode == "low_memory" else {}))
        if work.work == "load_all":
            read(model.unet, model.vae, model.text)
            return
        torch.save(start_step(model, work)(), folder / f"ours-{work.dtype}.pt")

    return step


def peer_imports(work: Work) -> None:
    """The same for the peer."""
    import transformers
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from diffusers.utils import logging

    imports(work)
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def start_peer(built: None, work: Work, folder: Path) -> Step:
    """The same through diffusers' pipeline."""
    from diffusers import StableDiffusionPipeline

    def step() -> None:
        pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, work.dtype))
        if work.work == "load_all":
            read(pipe.unet, pipe.vae, pipe.text_encoder)
            return
        ids = pipe.tokenizer(["", PROMPT], padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            context = pipe.text_encoder(ids)[0]
        torch.save(peer_step(pipe.unet, context, work)(), folder / f"peer-{work.dtype}.pt")

    return step


def read(*networks: torch.nn.Module) -> None:
    """Read every weight once."""
    for network in networks:
        for parameter in network.parameters():
            parameter.sum()


def measure() -> Iterator[dict[str, Any]]:
    """The rows of WORKS, then the two checks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = Side(imports, partial(start_ours, folder=folder))
        peer = Side(peer_imports, partial(start_peer, folder=folder))
        writer = Side(partial(write, folder=folder), peer.start)
        (first, *_), _ = WORKS[0]
        with Sides([Process("writing the folder", writer, first)]) as (process,):
            process.ask("start", first)         # answered once it has written
        for works, rounds in WORKS:
            for row in compare_cold(works, ours, peer, rounds):
                yield row
                check_growth(row)
        check_step(folder)


def check_growth(row: dict[str, Any]) -> None:
    """Raise PartFailed if reading all weights took more memory than is allowed."""
    if row["work"] != "load_all" or row["ours_bytes_over_weights"] is None:
        return
    with torch.device("meta"):
        model = untrained(SD1)
    numbers = sum(p.numel() for network in (model.unet, model.vae, model.text) for p in network.parameters())
    growth = row["ours_bytes_over_weights"] / (numbers * getattr(torch, row["dtype"]).itemsize)
    print(f"our peak while loading and reading all: {growth:.3f} times the weights")
    if growth > ALLOWED_GROWTH:
        raise PartFailed(f"loading took {growth:.3f} times the weights, more than {ALLOWED_GROWTH}")


def check_step(folder: Path) -> None:
    """Raise PartFailed if the first steps of the two sides differ."""
    mine, theirs = (torch.load(folder / f"{side}-float32.pt") for side in ("ours", "peer"))
    error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
    print(f"x after the first step: largest difference {error:.1e} of the peer's largest value")
    if not error <= ALLOWED_ERROR:
        raise PartFailed(f"the first step differs from diffusers' by {error:.1e}, more than {ALLOWED_ERROR}")


if __name__ == "__main__":
    command(__doc__, measure)
