"""What guidance buys and what it costs: fidelity against diversity, by a classifier and without one.

    python scripts/compare_guidance.py

The article's question. One model draws every class at several scales s: first without being told the class, while a
classifier that reads noise pulls with s times the gradient of log p(class | x_t); then classifier-free, by
eps(∅) + s (eps(class) - eps(∅)). Both begin at s = 0, where nothing guides. Measured on the drawings:

    fidelity    how often a judge sees the class that was asked for. It is a network of its own, trained by itself on
                cleaner pictures, and it never guided.
    diversity   the mean distance of two drawings of one class, as a root mean square over their pixels of [-1, 1].

Printed: a table, and what the best scale gains and loses. Written: the plot guidance.png, the table as guidance.json,
and drawings.png, a column of drawings a class at each scale, over the same noise.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _command import run
from _runs import new_folder, write_json
from torch import Tensor

import models
from guidance import classifier, generate
from inversion.report import comparison
from models import ClassModel, ModelError
from models.classifier import Classifier
from models.replacing import replacing

KINDS = {"classifier": "classifier guidance", "free": "classifier-free guidance"}
PLAIN = {"classifier": 0.0, "free": 1.0}     # the scale at which a kind's guidance is off


@dataclass
class Config:
    """model, guide, judge: a name or a file each, of models.load and models.load_classifier, with the same classes.

    classifier_scales, free_scales: the scales of either guidance, 0 of the first and 0 and 1 of the second among them.
    count: drawings of each class at each scale. steps, sampler: of the chain. dtype: of the networks, auto for the
    fastest here. seed: of the first drawing. output: a folder for what is written; None is a new one.
    """

    model: str = "emoji-classes"
    guide: str = "emoji-classes"
    judge: str = "emoji-classes-judge"
    classifier_scales: tuple[float, ...] = (0, 0.5, 1, 2, 4, 8)
    free_scales: tuple[float, ...] = (0, 0.5, 1, 2, 4, 8)
    count: int = 16
    steps: int = 50
    sampler: str = "ddpm"
    dtype: str = "auto"
    seed: int = 0
    output: Path | None = None


@dataclass(frozen=True)
class Row:
    """A kind of guidance at a scale: how often the judge agrees, with its standard error, and the mean distance."""

    kind: str
    scale: float
    fidelity: float
    error: float
    diversity: float


def draw(config: Config, model: ClassModel, guide: Classifier, kind: str, scale: float) -> Tensor:
    """`count` drawings of every class, class after class; each kind and scale begins from the same noise."""
    classes = [name for name in model.classes.names for _ in range(config.count)]
    how = {"scale": scale} if kind == "free" else {"scale": 0.0, "guidance": classifier(guide, classes, scale)}
    return generate(
        model, classes, steps=config.steps, sampler=config.sampler, generator=config.seed, batch_size=len(classes),
        progress=True, **how,
    )  # fmt: skip


@torch.no_grad()
def measured(judge: Classifier, images: Tensor, kind: str, scale: float) -> Row:
    """A row of the table. images: (classes * count, 3, H, W), class after class."""
    wanted = torch.arange(judge.classes).repeat_interleave(len(images) // judge.classes)
    weight = next(judge.parameters())
    seen = judge(images.to(weight), torch.zeros(len(images), device=weight.device)).argmax(dim=1).cpu()
    right = (seen == wanted).float().mean().item()
    return Row(kind, scale, right, (right * (1 - right) / len(images)) ** 0.5, distance(images, judge.classes))


def distance(images: Tensor, classes: int) -> float:
    """Mean over the classes of the mean distance of two of their images (classes * n, 3, H, W), n >= 2."""
    of_each = images.flatten(1).unflatten(0, (classes, -1))                                    # (classes, n, D)
    pairs = torch.cdist(of_each, of_each) / of_each.shape[2] ** 0.5                            # (classes, n, n)
    n = pairs.shape[1]
    return (pairs.sum(dim=(1, 2)) / (n * (n - 1))).mean().item()


def best(rows: list[Row]) -> Row:
    """The row of the highest fidelity; of several, that of the smallest scale."""
    return max(rows, key=lambda row: (row.fidelity, -row.scale))


def table(rows: list[Row]) -> list[str]:
    """A line a scale, and for each kind what its best scale gains over none."""
    lines = [f"{'guidance':24}  {'s':>4}  {'judge agrees':>14}  distance"]
    for row in rows:
        agrees = f"{row.fidelity:.1%} ± {row.error:.1%}"
        lines.append(f"{KINDS[row.kind]:24}  {row.scale:4g}  {agrees:>14}  {row.diversity:8.3f}")
    for kind, of in ((kind, [row for row in rows if row.kind == kind]) for kind in KINDS):
        top, plain = best(of), next(row for row in of if row.scale == PLAIN[kind])
        lines.append(
            f"{KINDS[kind]} at s = {top.scale:g}: the judge agrees {100 * (top.fidelity - plain.fidelity):+.1f} points "
            f"more often than at s = {plain.scale:g}, the distance is {top.diversity / plain.diversity - 1:+.1%}"
        )
    return lines


def plot(file: Path, rows: list[Row], steps: str) -> None:
    """Fidelity over diversity, a curve a kind, with the scale beside each point; and fidelity over the scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    trade, rise = figure.subplots(1, 2)
    for kind, colour in zip(KINDS, ("tab:blue", "tab:orange")):
        of = [row for row in rows if row.kind == kind]
        right, error = [100 * row.fidelity for row in of], [100 * row.error for row in of]
        trade.plot([row.diversity for row in of], right, "o-", color=colour, label=KINDS[kind])
        for row, y in zip(of, right):
            trade.annotate(f"{row.scale:g}", (row.diversity, y), (4, 4), textcoords="offset points", fontsize=8)
        rise.errorbar(range(len(of)), right, error, marker="o", color=colour, label=KINDS[kind])
    rise.set_xticks(range(len(of)), [f"{row.scale:g}" for row in of])
    trade.set(xlabel="diversity: distance of two drawings", ylabel="fidelity: judge agrees, %", title="the trade, by s")
    rise.set(xlabel="scale s", ylabel="judge agrees, %", title=steps)
    trade.legend(loc="lower left")
    with replacing(file) as beside:
        figure.savefig(beside, format="png", dpi=150)


def loaded(config: Config) -> tuple[ClassModel, Classifier, Classifier]:
    """Model, guide and judge. Raises ModelError unless they know the same classes and images, and ∅."""
    model = models.load(config.model, config.dtype)
    networks = [models.load_classifier(source, config.dtype, model.device) for source in (config.guide, config.judge)]
    if not isinstance(model, ClassModel) or not model.guides_itself:
        raise ModelError(f"{config.model} is no model of classes that met ∅ in training, too: it cannot guide itself")
    for source, network in zip((config.guide, config.judge), networks):
        if network.names != model.classes or network.image_size != model.resolution:
            raise ModelError(
                f"{source} knows {network.names} at {network.image_size} pixels, and {config.model} draws "
                f"{model.classes} at {model.resolution}"
            )
    return model, *networks


def main(config: Config) -> None:
    """Draw, judge, print and write."""
    scales = {"classifier": sorted(config.classifier_scales), "free": sorted(config.free_scales)}
    if 0 not in scales["classifier"] or not {0, 1} <= set(scales["free"]):
        raise ModelError("--classifier-scales needs 0, and --free-scales 0 and 1: what is gained is gained over them")
    if not all(math.isfinite(scale) for several in scales.values() for scale in several):
        raise ModelError("--classifier-scales and --free-scales are finite numbers")
    if Path(config.judge).resolve() == Path(config.guide).resolve():
        raise ModelError(f"{config.judge} cannot judge what it guides: the judge is another network")
    if config.count < 2:
        raise ModelError(f"--count is at least 2 drawings a class, for a distance, not {config.count}")
    output, begun = new_folder(config.output, "guidance"), time.monotonic()
    (model, guide, judge), rows, sheet = loaded(config), [], []
    for kind, scale in [(kind, scale) for kind, several in scales.items() for scale in several]:
        images = draw(config, model, guide, kind, scale)
        rows.append(measured(judge, images.to(model.device), kind, scale))
        sheet.append((f"{KINDS[kind]}, s = {scale:g}", images[:: config.count]))
    output.mkdir(parents=True, exist_ok=True)
    print("\n".join(table(rows)))
    print(f"{config.count} drawings of each of {len(model.classes)} classes, {config.steps} steps of {config.sampler}")
    plot(output / "guidance.png", rows, f"{config.steps} steps of {config.sampler}")
    comparison(output / "drawings.png", sheet, model.classes.names)
    write_json(output / "guidance.json", {"rows": [asdict(row) for row in rows], "config": asdict(config)})
    print(f"wrote {output} after {(time.monotonic() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main)
