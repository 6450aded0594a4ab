"""What GLIDE costs at its real size, with random weights: a guided step, an upsampler step, an inversion step.

    python benchmarks/glide.py

Each part runs in a process of its own, which prints seconds (the best of three, after one to warm up) and the peak of
resident memory above what the process held with the weights in place. Inversion: batch 4, one vector, forward and
backward through text transformer and UNet. OpenAI's code on the same kind of machine (two cores, float32): 1.5 s a
guided base step; 7.3 s and 4.4 GiB above the weights an inversion step at batch 4.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffusion import Level
from guidance.classifier_free import bind, classifier_free_pair
from inversion import Concept
from inversion.objective import denoising_loss, random_batch
from models.glide import GlideModel
from models.glide_text import GlideText
from models.glide_tokenizer import GlideTokenizer
from models.presets import GLIDE
from models.unet import UNet

PARTS = [f"{part} {dtype}" for part in ("base", "upsample", "inversion") for dtype in ("float32", "bfloat16")]
PROMPT, GIB = "an oil painting of a corgi", 2**30


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def build(name: str, dtype: torch.dtype) -> GlideModel:
    """A published network with random weights."""
    torch.manual_seed(0)
    preset = GLIDE[name]
    unet, text = UNet(preset.unet).to(dtype), GlideText(preset.text).to(dtype)
    for parameter in unet.out.parameters():
        parameter.data.normal_(std=0.02)     # a new UNet is silent; this one should send gradients back
    return GlideModel(
        unet.eval().requires_grad_(False), text.eval().requires_grad_(False), GlideTokenizer.gpt2(), preset.schedule,
        preset.resolution, preset.factor, preset.inpaints, f"random {name}",
    )  # fmt: skip


def base(model: GlideModel) -> Callable[[], object]:
    """One guided prediction of one 64x64 image: two prompts through the UNet."""
    features = model.encode_text(model.tokenizer.encode(["", PROMPT]))
    denoise, x = classifier_free_pair(bind(model, features), 3.0), torch.randn(1, 3, 64, 64)
    return lambda: denoise(x, Level(500.0, 0.5))


def upsample(model: GlideModel) -> Callable[[], object]:
    """One prediction of one 256x256 image."""
    features = model.encode_text(model.tokenizer.encode([PROMPT]))
    denoise = bind(model.given((256, 256), torch.rand(1, 3, 64, 64) * 2 - 1, None, None), features)
    x = torch.randn(1, 3, 256, 256)
    return lambda: denoise(x, Level(500.0, 0.5))


def inversion(model: GlideModel) -> Callable[[], object]:
    """The gradient of four samples' loss on one vector."""
    from diffusion import Schedule

    schedule, generator = Schedule(**model.schedule), torch.Generator().manual_seed(0)
    templates = [["a photo of {}", "a picture of {} in the snow", "{} up close", "one {} in a garden"]] * 4
    batch = random_batch(
        torch.rand(4, 3, 64, 64) * 2 - 1, templates, torch.arange(4), torch.arange(4), (3, 64, 64), 1000, generator
    )

    def step() -> torch.Tensor:
        concept = Concept("<x>", model.embedding(3290)[None].requires_grad_())
        with torch.enable_grad():
            loss = denoising_loss(model, schedule, batch, "<x>", concept).mean()
            (gradient,) = torch.autograd.grad(loss, concept.vectors)
        return gradient

    return step


def measure(part: str, dtype: str) -> None:
    """Run a part and print what it costs."""
    model = build("upsample" if part == "upsample" else "base", getattr(torch, dtype))
    with torch.no_grad():
        work = {"base": base, "upsample": upsample, "inversion": inversion}[part](model)
        held, seconds = status("VmRSS"), []
        Path("/proc/self/clear_refs").write_text("5")     # begin the peak anew: building a model has one of its own
        for _ in range(4):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    peak = status("VmHWM")
    print(
        f"{part:9} {dtype:8}  {min(seconds[1:]):6.2f} s  peak {(peak - held) / GIB:.2f} GiB above the weights "
        f"({held / GIB:.2f} GiB with torch), {peak / GIB:.2f} GiB in all",
        flush=True,
    )


def main() -> int:
    """Every part in a process of its own. Returns the exit code."""
    return max(subprocess.run([sys.executable, __file__, *part.split()]).returncode for part in PARTS)


if __name__ == "__main__":
    sys.exit(measure(*sys.argv[1:]) if sys.argv[1:] else main())
