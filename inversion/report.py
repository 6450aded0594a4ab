"""A training at a glance: its loss curve, and one picture of what was shown and what was learned."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.files import as_path
from models.replacing import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 8     # of a sheet, at the most


def loss_curve(file: str | Path, history: Sequence[dict[str, Any]], caption: tuple[str, float] | None = None) -> None:
    """Draw validation and training losses, and each vector's norm and cosine to its start, into a PNG.

    history: as `Result.history`. caption: the concept's plain words and their loss, drawn as a line to beat.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, vectors = figure.subplots(1, 2, width_ratios=(3, 2))
    steps = [row["step"] for row in history]
    trained = [(row["step"], row["loss"]) for row in history if row["loss"] is not None]
    if trained:
        losses.plot(*zip(*trained), color="0.75", label="training (random draws)")
    losses.plot(steps, [row["validation_loss"] for row in history], marker=".", label="validation (fixed)")
    if caption is not None:
        words = textwrap.shorten(caption[0], 40, placeholder=" …")
        losses.axhline(caption[1], color="tab:red", linestyle=":", label=f"validation, “{words}” as words")
    losses.set(xlabel="step", ylabel="loss", title="denoising loss")
    losses.legend()
    for key, style in (("norms", "-"), ("cosines", "--")):
        vectors.plot(steps, [row[key] for row in history], style, color="tab:blue", alpha=0.7)
    vectors.plot([], [], "-", color="tab:blue", label="norm")
    vectors.plot([], [], "--", color="tab:blue", label="cosine to the start")
    vectors.set(xlabel="step", title="learned vectors")
    vectors.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)     # curves may be anywhere
    for axes in (losses, vectors):
        axes.locator_params(axis="x", integer=True)
    _write(figure, file)


def comparison(file: str | Path, rows: Sequence[tuple[str, Tensor]], columns: Sequence[str] = ()) -> None:
    """Draw rows of images under their labels into a PNG.

    rows: (label, images (K, 3, H, W) in [-1, 1]), K of each row's own. columns: what stands above the columns
    of the rows after the first, whose images have no seed.
    """
    from matplotlib.figure import Figure

    width = max(len(images) for _, images in rows)
    figure = Figure(figsize=(max(1.6 * width, 4.8), 2.0 * len(rows)), layout="constrained")
    characters = int(10 * figure.get_figwidth())            # of a label, beside each other
    grid = figure.subfigures(len(rows), 1, squeeze=False)
    for i, ((label, images), part) in enumerate(zip(rows, grid[:, 0])):
        part.suptitle(textwrap.fill(label, characters), x=0.01, horizontalalignment="left", fontsize=11)
        for j, axes in enumerate(part.subplots(1, width, squeeze=False)[0]):
            axes.axis("off")
            if j < len(images):
                _show(axes, images[j])
            if i and j < len(columns):
                axes.set_title(columns[j], fontsize=8, pad=2)
    _write(figure, file)


def sheet(file: str | Path, images: Tensor, captions: Sequence[str]) -> None:
    """Draw images (K, 3, H, W) in [-1, 1], each under its caption, into a PNG."""
    from matplotlib.figure import Figure

    columns = min(len(images), COLUMNS)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions):
        _show(axes, image)
        axes.set_title(textwrap.fill(caption, 24), fontsize=7, pad=2)
    _write(figure, file)


def _show(axes: "Axes", image: Tensor) -> None:
    pixels = ((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0)                                   # (H, W, 3)
    axes.imshow(pixels.cpu().numpy(), interpolation="nearest")


def _write(figure: "Figure", file: str | Path) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(lambda each: isinstance(each, Text) and "$" in each.get_text()):
        text.set_parse_math(False)          # somebody's words, and no formula between two $
    with replacing(as_path(file)) as beside:
        figure.savefig(beside, format="png", dpi=150)
