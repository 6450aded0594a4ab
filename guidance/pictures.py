"""What a caller's image and mask are to a model: where it starts, what stays, what is enlarged.

Checked, and brought to one form. Every refusal is a GuidanceError.
"""

import warnings
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from guidance.errors import GuidanceError


class Pictures(NamedTuple):
    """What a caller's image is to a model, (B, 3, ., .) each: where it starts; what stays of it, with the masks; what
    is enlarged. sides: the height and width that the model draws.
    """

    start: Tensor | None
    kept: tuple[Tensor, Tensor] | None
    small: Tensor | None
    sides: tuple[int, int]


def pictures(
    model: Any, image: Tensor | None, mask: Tensor | None, count: int, height: int | None, width: int | None
) -> Pictures:
    """The image and mask of `guidance.generate`, for `count` prompts."""
    usual = tuple(model.resolution if side is None else side for side in (height, width))
    image = None if image is None else start(image, count)
    if model.factor > 1:
        return Pictures(None, None, enlarged(model, image, mask, count, usual), usual)
    if mask is not None:
        image, mask = kept(model, image, mask, count)
        factor = model.upsampler.factor if model.upsampler else 1
        _require_sides(image, factor, height, width)
        return Pictures(None, (image, mask), None, tuple(side // factor for side in image.shape[2:]))
    if image is not None:
        _require_sides(image, 1, height, width)
        return Pictures(image, None, None, tuple(image.shape[2:]))
    return Pictures(None, None, None, usual)


def start(image: Tensor, count: int) -> Tensor:
    """The images to start from, one a prompt: (B, 3, H, W)."""
    if not isinstance(image, Tensor):
        raise GuidanceError(f"an image is a tensor (3, H, W), not a {type(image).__name__}")
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != 3 or len(image) not in (1, count):
        raise GuidanceError(
            f"an image to start from is (3, H, W), or ({count}, 3, H, W) for as many prompts, not "
            f"{tuple(image.shape)}"
        )
    if not image.numel():
        raise GuidanceError(f"an image to start from has pixels, and this one is {tuple(image.shape)}")
    if not image.is_floating_point() or not image.abs().max() <= 1:
        raise GuidanceError(f"an image to start from holds floats in [-1, 1], not {_span(image)}")
    if 0 <= image.min() < image.max():
        said = "no pixel of the image is darker than middle grey; it is to be in [-1, 1]"
        warnings.warn(f"{said}: if it is in [0, 1], give 2x - 1", UserWarning, stacklevel=5)   # past generate's no_grad
    return image.float().expand(count, -1, -1, -1)


def _require_sides(image: Tensor, factor: int, height: int | None, width: int | None) -> None:
    """The image is as large as what is drawn: `factor` times the base's height and width, where these are given."""
    for side, asked, found in (("height", height, image.shape[2]), ("width", width, image.shape[3])):
        if found % factor:
            raise GuidanceError(f"the {side} of the image is {found}: make it a multiple of {factor}")
        if asked not in (None, found // factor):
            raise GuidanceError(
                f"the {side} asked for, {asked}, is not {found // factor}, which is drawn for an image of {found}: "
                "leave it out, or crop the image"
            )


def enlarged(model: Any, image: Tensor | None, mask: Tensor | None, count: int, sides: tuple[int, int]) -> Tensor:
    """The small images (B, 3, h, w) that an upsampler by itself makes images of these sides of: those of `start`."""
    if any(side % model.factor for side in sides):
        raise GuidanceError(f"{model.source} makes images whose sides are multiples of {model.factor}, not {sides}")
    height, width = (side // model.factor for side in sides)
    if image is None:
        raise GuidanceError(
            f"{model.source} is an upsampler: give it an image of {width}x{height} pixels, or make it the `upsampler` "
            "of a base model"
        )
    if mask is not None:
        raise GuidanceError("a mask is for a base model with its upsampler: make this one the `upsampler` of a base")
    if tuple(image.shape[2:]) != (height, width):
        raise GuidanceError(
            f"{model.source} makes {sides[1]}x{sides[0]} pixels of {width}x{height}; this image has "
            f"{image.shape[3]}x{image.shape[2]}: reduce it, or ask for {model.factor} times its height and width"
        )
    return image


def kept(model: Any, image: Tensor | None, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What an inpainting model keeps: the images of `start` and masks (B, 1, H, W), 1 where the image stays."""
    networks = [network for network in (model, model.upsampler) if network is not None]
    if not all(getattr(network, "inpaints", False) for network in networks):
        raise GuidanceError(f"a mask is for inpainting models, and {networks[-1].source} is none: leave the mask out")
    if image is None:
        raise GuidanceError("a mask says which part of an image stays: give the image, too")
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise GuidanceError(f"a mask is a tensor of 0 and 1, (H, W), not {_kind(mask)}")
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask[None] if mask.ndim == 3 else mask
    if mask.shape not in ((1, 1, *image.shape[2:]), (count, 1, *image.shape[2:])):
        raise GuidanceError(f"the mask is {tuple(mask.shape)}, the image {tuple(image.shape)}: make it (H, W) of that")
    if not ((mask == 0) | (mask == 1)).all():
        raise GuidanceError("a mask holds 1 where the image stays and 0 where it is drawn anew, and nothing between")
    return image, mask.float().expand(count, -1, -1, -1)


def reduced(kept: tuple[Tensor, Tensor] | None, factor: int) -> tuple[Tensor, Tensor] | None:
    """What is kept, for a network that draws `factor` times smaller: a pixel stays if all that it covers does."""
    if kept is None:
        return None
    image, mask = kept
    return F.avg_pool2d(image, factor), -F.max_pool2d(-mask, factor)


def _kind(mask: Any) -> str:
    return str(mask.dtype) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"


def _span(image: Tensor) -> str:
    return f"{str(image.dtype).removeprefix('torch.')} from {image.min().item():g} to {image.max().item():g}"
