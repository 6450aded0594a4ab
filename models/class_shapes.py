"""What the tensors of a guided-diffusion file say about its UNet, and what they leave open.

Names and shapes tell nearly everything. Three things leave no trace in them: the order in which attention stores its
projections, into how many heads it divides them, and what the images and the noise were in training. The published
files are known by all the rest; for others the caller has to say it.

Source: openai/guided-diffusion @ 22e0df8, unet.py.
"""

from collections.abc import Mapping
from typing import Any

from models.errors import ModelError
from models.shapes import Shapes

OPEN = {
    "attention": "'self' (queries, keys and values one after the other: the new order) or 'self_legacy' (head by head)",
    "num_heads": "heads of every attention, or head_channels, channels of every head",
    "resolution": "the side of its images, in pixels",
    "schedule": "'linear' or 'squaredcos_cap_v2', or keyword arguments of diffusion.Schedule",
    "factor": "how many times it enlarges the small images that it is shown",
}


def certain(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """The fields of a UNetConfig that a file's tensors tell. Raises ModelError for tensors of no such UNet.

    A level ends on the way up where a stage has something that resamples; the way down is its mirror image. So the
    number of blocks is certain even where a block that resamples has the same tensors as one that does not.
    """
    s = Shapes(shapes, "", where)
    width = s.of("time_embed.0.weight", 2)[1]
    stages = s.count(r"output_blocks\.(\d+)\.")
    ends = [i for i in range(stages) if _resamples(s, i)]
    blocks = (ends[0] if ends else stages - 1) + 1                          # of a level going up, one more than down
    levels, rest = divmod(stages, blocks)
    if rest or ends != [blocks * (i + 1) - 1 for i in range(levels - 1)]:
        raise ModelError(f"{where}: its {stages} output blocks are not levels of equally many")
    first = [1 + blocks * i for i in range(levels)]                         # input block that a level begins with
    channels = [s.of(f"input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in first]
    time = s.of("input_blocks.1.0.emb_layers.1.weight", 2)[0]
    return {
        "in_channels": s.of("input_blocks.0.0.weight", 4)[1],
        "out_channels": s.of("out.2.weight", 4)[0],
        "model_channels": width,
        "channel_mult": tuple(c / width if c % width else c // width for c in channels),
        "num_res_blocks": blocks - 1,
        "attention_resolutions": tuple(
            2**level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in s
        ),
        "context_dim": 0,
        "resblock_updown": levels > 1 and f"input_blocks.{blocks}.0.op.weight" not in s,
        "scale_shift": time == 2 * channels[0],
        "num_classes": s.of("label_emb.weight", 2)[0] if "label_emb.weight" in s else None,
    }


def _resamples(s: Shapes, stage: int) -> bool:
    """Whether a stage of the way up ends by doubling: in a convolution, or in a second residual block."""
    return any(
        f"output_blocks.{stage}.{i}.{leaf}" in s for i in (1, 2) for leaf in ("conv.weight", "in_layers.2.weight")
    )


def completed(known: dict[str, Any], said: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """What the tensors left open, as the caller says it.

    known: what `certain` found. said: `models.load`'s config. Returns attention, num_heads, head_channels, resolution,
    schedule (keyword arguments) and factor. Raises ModelError naming what is missing, and what cannot be said.
    """
    if said and not isinstance(said, Mapping):
        raise ModelError(f"config is {{name: value}} for {where}, not {said!r}")
    said = dict(said or {})
    wanted = {key: text for key, text in OPEN.items() if key != "factor" or known["in_channels"] > 3}
    allowed = {*wanted, "head_channels"}
    if unknown := said.keys() - allowed:
        raise ModelError(f"config takes {', '.join(sorted(allowed))} for {where}, not {', '.join(sorted(unknown))}")
    given = said.keys() | ({"num_heads"} if "head_channels" in said else set())
    if missing := [f"{key}, {text}" for key, text in wanted.items() if key not in given]:
        raise ModelError(
            f"{where} is none of guided-diffusion's published models, and its tensors do not tell all of it; give "
            f"config={{...}} with {'; '.join(missing)}"
        )
    if said["attention"] not in ("self", "self_legacy"):
        raise ModelError(f"{where}: attention is {said['attention']!r}, not {OPEN['attention']}")
    for key in ("resolution", "factor", "num_heads", "head_channels"):
        unsaid = None if "head" in key else 1
        if (value := said.get(key, unsaid)) != unsaid and (not isinstance(value, int) or value < 1):
            raise ModelError(f"{where}: {key} is {value!r}, not a whole number: {OPEN.get(key, OPEN['num_heads'])}")
    schedule = said["schedule"]
    if not isinstance(schedule, (str, Mapping)):
        raise ModelError(f"{where}: schedule is {schedule!r}, not {OPEN['schedule']}")
    found = {key: said.get(key) for key in ("attention", "num_heads", "head_channels", "resolution")}
    return found | {
        "schedule": {"name": schedule} if isinstance(schedule, str) else dict(schedule), "factor": said.get("factor", 1)
    }
