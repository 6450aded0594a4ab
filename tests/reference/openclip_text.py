"""The reference case `openclip_text`: an OpenCLIP text tower as Stable Diffusion 2.x single files store it.

`out.last` has every block run, `out.penultimate` all but the last; both end in the final norm, as in 2.x.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.renaming import LAYOUTS
from models.text import ClipText, ClipTextConfig
from models.weights import Part, assign, on_meta


def check(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, ours, expected) for both outputs."""
    state = {
        name.removeprefix("state."): t.float() for name, t in tensors.items() if name.startswith("state.")
    }
    mlp_width = state["cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    for name, layers in (("penultimate", config["layers"] - 1), ("last", config["layers"])):
        numbers = (
            config["vocab"],
            config["context"],
            config["width"],
            layers,
            config["heads"],
            mlp_width,
            "gelu",
        )
        text = on_meta(lambda: ClipText(ClipTextConfig(*numbers)))  # noqa: B023 (called at once)
        assign([Part(text, LAYOUTS["text"]["single openclip"])], state, "the case")
        with torch.no_grad():
            yield f"out.{name}", text(tensors["in.tokens"]).context, tensors[f"out.{name}"]
