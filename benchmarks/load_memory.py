"""What loading Stable Diffusion 1.5 costs, and whether a guided step of it is diffusers' step.

    python benchmarks/load_memory.py

Networks of SD 1.5's real size with random weights are saved by diffusers to a temporary folder (4.3 GB), then
loaded with `models.load`, each in a process of its own. Printed: by how much the process's largest resident
memory grew while loading, over the size of the weights, in float32 and converted to bfloat16; and after a
guided DDIM step of 512x512 in float32, when every weight has been read, the largest difference from diffusers
over its largest value. Exits 1 above 1.2 times the weights, or above 1e-4.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from models import ClipTokenizer

ALLOWED_GROWTH, ALLOWED_ERROR = 1.2, 1e-4
PROMPT, SCALE, STEPS = "a photograph of an astronaut riding a horse", 7.5, 50


def peak() -> int:
    """The largest resident memory of this process so far, in bytes, mapped files included."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def write(folder: Path) -> None:
    """Save SD 1.5's networks, untrained, as diffusers and transformers save them."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    ClipTokenizer.clip().save(folder / "tokenizer")


def load(folder: Path, dtype: str) -> float:
    """Load the folder; returns by how many times the weights the peak of memory grew."""
    import safetensors.torch  # noqa: F401 (what is imported only once is not the model's cost)

    import models

    with torch.no_grad():
        nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
    before, started = peak(), time.perf_counter()
    model = models.load(folder, dtype=dtype, device="cpu")
    seconds, grown = time.perf_counter() - started, peak() - before
    networks = (model.unet, model.vae, model.text)
    weights = sum(p.nbytes for network in networks for p in network.parameters())
    for network in networks:
        for parameter in network.parameters():
            parameter.sum()  # reads every weight once, as any use of the model does
    read = peak() - before
    print(
        f"{dtype}: loaded in {seconds:.1f} s; weights {weights / 2**30:.2f} GiB; peak memory grew by "
        f"{grown / weights:.3f} of them while loading, {read / weights:.3f} once all had been read"
    )
    return read / weights


def ours(folder: Path) -> Tensor:
    """x_s after one guided DDIM step, through this project."""
    import models
    from diffusion import Schedule
    from diffusion.steps import ddim_step
    from diffusion.times import leading
    from guidance.classifier_free import bind, classifier_free_pair

    model = models.load(folder, device="cpu")
    features = model.encode_text(model.tokenizer.encode(["", PROMPT]))
    schedule = Schedule(**model.schedule)
    level, lower = schedule.levels(leading(schedule.steps, STEPS, offset=1))[:2]
    denoise = classifier_free_pair(bind(model, features), SCALE)
    return ddim_step(latents(), denoise(latents(), level), level, lower)


def theirs(folder: Path) -> Tensor:
    """The same step through diffusers and transformers."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(["", PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    context = CLIPTextModel.from_pretrained(folder / "text_encoder")(ids).last_hidden_state
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[0]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    null, conditional = unet(torch.cat([latents()] * 2), t, context).sample.chunk(2)
    return scheduler.step(null + SCALE * (conditional - null), t, latents()).prev_sample


def latents() -> Tensor:
    """The start: (1, 4, 64, 64) from a fixed seed."""
    return torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))


def compare(folder: Path) -> float:
    """The largest difference of the two steps, over diffusers' largest value."""
    with torch.no_grad():
        mine, reference = ours(folder), theirs(folder)
    error = ((mine - reference).abs().max() / reference.abs().max()).item()
    print(f"one guided step: largest difference {error:.1e} of diffusers' largest value")
    return error


def main() -> int:
    """Everything, each part in a process of its own. Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("write", "load float32", "load bfloat16", "compare"):
            code = subprocess.run([sys.executable, __file__, *part.split(), folder]).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", folder]:
            write(Path(folder))
        case ["load", dtype, folder]:
            sys.exit(load(Path(folder), dtype) > ALLOWED_GROWTH)
        case ["compare", folder]:
            sys.exit(not compare(Path(folder)) <= ALLOWED_ERROR)
        case _:
            sys.exit(main())
