"""Compare this project with numbers that the published reference implementations computed.

    python tests/check_reference.py DIR

DIR holds cases: a NAME.json (configuration, bounds) beside a NAME.safetensors (weights, inputs, outputs). For
each output it prints `case tensor error`, the error being max|ours - reference| / max|reference|, computed in
float32 with the configuration from the JSON. It exits 1 if an error passes the case's own bounds, or if a
case cannot be run.

A family is a module in tests/reference/ whose `check(config, tensors)` yields (name, ours, expected).
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

FAMILIES = (
    "adm", "compvis_ldm", "diffusion_math", "glide_noisy_clip", "glide", "openclip_text", "tokenizer_clip",
    "tokenizers_glide",
)  # fmt: skip

Check = Callable[[dict, dict[str, Tensor]], Iterator[tuple[str, Tensor, Tensor]]]


def cases(folder: Path) -> list[Path]:
    """The JSON files of a folder's cases: those beside a .safetensors file, and those of tokenizers."""
    files = sorted(folder.glob("*.json"))
    return [
        file
        for file in files
        if file.with_suffix(".safetensors").exists() or file.stem.startswith("tokenizer")
    ]


def family(name: str) -> str | None:
    """The family that a case belongs to by its name, None if there is none."""
    return next((known for known in FAMILIES if name == known or name.startswith(known + "_")), None)


def checker(name: str) -> Check:
    """The `check` of a family's module."""
    spec = importlib.util.spec_from_file_location(f"reference_{name}", HERE / "reference" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.check


def error(ours: Tensor, expected: Tensor) -> float:
    """max|ours - expected| / max|expected|; infinite for another shape or anything that is not finite."""
    if ours.shape != expected.shape or not ours.isfinite().all():
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().item()
    return (ours.double() - expected.double()).abs().max().item() / (scale or 1.0)


def bound(name: str, bounds: dict[str, float]) -> float:
    """What a tensor's error may be; ids have no bounds and must be equal."""
    return bounds.get("gradient" if name.endswith("_grad") else "output", 0.0)


def run(file: Path) -> list[str]:
    """Check one case, printing a line a tensor. Returns what went wrong."""
    config = json.loads(file.read_text(encoding="utf-8"))
    weights = file.with_suffix(".safetensors")
    tensors = load_file(weights) if weights.exists() else {}
    expected = {name for name in tensors if name.startswith("out.")}
    wrong, answered = [], set()
    for name, ours, reference in checker(family(file.stem))(config, tensors):
        answered.add(name)
        off, allowed = error(ours, reference), bound(name, config.get("bounds", {}))
        print(f"{file.stem} {name} {off:.2e}")
        if not off <= allowed:
            wrong.append(f"{file.stem} {name}: error {off:.2e} is above {allowed:.0e}")
    return wrong + [f"{file.stem} {name}: nothing computes it" for name in sorted(expected - answered)]


def main(folder: str) -> int:
    """Check every case of a folder. Returns the exit code."""
    torch.manual_seed(0)
    found, wrong = cases(Path(folder)), []
    if not found:
        wrong.append(f"{folder} holds no case")
    for file in found:
        if family(file.stem):
            try:
                wrong += run(file)
            except (
                Exception
            ) as reason:  # whatever a case makes fail is that case's failure, not the end of the run
                wrong.append(f"{file.stem}: cannot be run: {type(reason).__name__}: {reason}")
        else:
            wrong.append(f"{file.stem}: no family of that name")
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/check_reference.py DIR")
    sys.exit(main(sys.argv[1]))
