"""How far the plan is off: its predicted peak against that of a real training, Stable Diffusion 1.5, batch 1.

    python benchmarks/plan.py [--json FILE]

Each setting runs in a process of its own: networks of random weights on the CPU, the image encoded, the VAE let go, the
start measured, one step taken. Measured is the largest resident size meanwhile above what the process held before it
had any weights and after a tiny model had done all this: the program's own code is not the model's. Predicted is
`inversion.plan`. Then what is predicted for a CUDA device, which need not be there.

JSON: rows of `work` (plan_cpu or plan_cuda), `dtype`, `resolution`, `mode` ("low_memory" with checkpointing blocks),
`checkpointing`, `attention`, `offload`, `predicted_bytes`, `measured_bytes` and `ratio_bytes`, their quotient; null
where nothing was measured, as everywhere in the columns that compare with a peer.
"""

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _measure import json_file, told, write
from _networks import fill
from _process import PartFailed, ended, resident

import inversion
from inversion import Concept, TrainConfig, Training
from inversion.sizes import size
from models import LatentModel, Setting, outline

MODEL, WORD = "sd1.5", "<frida>"
MEASURED = [
    (256, Setting(torch.float32, "none", "fused")),
    (256, Setting(torch.float32, "blocks", "fused")),
    (256, Setting(torch.bfloat16, "none", "sliced")),
    (512, Setting(torch.bfloat16, "none", "sliced")),
    (512, Setting(torch.bfloat16, "blocks", "sliced")),
    (512, Setting(torch.float32, "blocks", "fused")),
]
CUDA = [
    (512, Setting(torch.float16, "none", "fused")),
    (512, Setting(torch.float16, "blocks", "fused")),
    (512, Setting(torch.float16, "blocks", "fused", "stream")),
]


def of_random_weights(name: str, dtype: torch.dtype) -> LatentModel:
    """A preset's model, frozen, every weight in memory, see `fill`."""
    model = outline(name)
    for network in (model.unet, model.vae, model.text):
        fill(network, dtype)
    return model


def measure(side: int, setting: Setting) -> int:
    """The peak of a training's preparation and first step, in this process."""
    train("tiny", 32, setting)
    before = resident("VmRSS")
    train(MODEL, side, setting)
    return resident("VmHWM") - before


def train(name: str, side: int, setting: Setting) -> None:
    """Encode an image, and take a step."""
    model = of_random_weights(name, setting.dtype)
    model.checkpointing, model.attention = setting.checkpointing, setting.attention
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = TrainConfig(steps=1, batch_size=1, accumulation=1, validation_pairs=1)
    training = Training(model, Concept.from_text(model, WORD, "dog"), image, [["a photo of {}"]], config)
    for _ in training.steps():
        pass


def row(device: str, side: int, setting: Setting, predicted: int, measured: int | None) -> dict[str, Any]:
    """A line of the table as JSON has it."""
    mode = "low_memory" if setting.checkpointing == "blocks" else "plain"
    how = asdict(setting) | {"dtype": str(setting.dtype).removeprefix("torch.")}
    ratio = None if measured is None else predicted / measured
    found = {"predicted_bytes": predicted, "measured_bytes": measured, "ratio_bytes": ratio}
    nothing = dict.fromkeys(("ours_s", "peer_s", "ratio", "ours_bytes_over_weights", "peer_bytes_over_weights"))
    return {"work": f"plan_{device}", "resolution": side, "mode": mode} | how | nothing | found


def measured_apart(index: int) -> int:
    """`measure` in a new process."""
    done = subprocess.run([sys.executable, __file__, "--measure", str(index)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise PartFailed(f"measuring {MEASURED[index][1]}: {ended(done.returncode)}")
    return int(done.stdout)


def planned(device: str, works: list[tuple[int, Setting]]) -> list[inversion.Planned]:
    """The plans of some sides and settings."""
    found = {}
    for side in {side for side, _ in works}:
        settings = [setting for other, setting in works if other == side]
        found |= {(side, each.setting): each for each in inversion.plan(MODEL, side, 1, device, settings)}
    return [found[work] for work in works]


def main() -> None:
    """All rows, or one measurement, printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the rows of the table there as well")
    parser.add_argument("--measure", type=int, metavar="I", help="only measure the I-th setting, and print bytes")
    given = parser.parse_args()
    with told():
        if given.measure is None:
            everything(given.json)
        else:
            print(measure(*MEASURED[given.measure]))


def everything(file: Path | None) -> None:
    """All rows, printed, and written."""
    rows = []
    print(f"{'':62} {'predicted':>10} {'measured':>10} {'ratio':>6}")
    for device, works in (("cpu", MEASURED), ("cuda", CUDA)):
        for i, ((side, setting), plan) in enumerate(zip(works, planned(device, works))):
            rows.append(row(device, side, setting, plan.peak, measured_apart(i) if device == "cpu" else None))
            measured, ratio = rows[-1]["measured_bytes"], rows[-1]["ratio_bytes"]
            numbers = ("-", "-") if measured is None else (size(measured), f"{ratio:.3f}")
            what = f"{device} {side} {str(setting).replace(', offload none', '')}"
            print(f"{what:62} {size(plan.peak):>10} {numbers[0]:>10} {numbers[1]:>6}", flush=True)
            write(file, rows)


if __name__ == "__main__":
    main()
