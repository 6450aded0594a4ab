"""GLIDE as its users hold it: text in, raw predictions over pixels, images out.

Four networks were published: a base model for 64 pixels, an upsampler from there to 256, and an inpainting form of
each. All are one UNet with one text transformer of its own; they differ in size and in what stands beside the noisy
image in the input channels.

Source: Nichol et al. 2022 (GLIDE); openai/glide-text2im @ 69b5307, text2im_model.py and model_creation.py.
"""

import torch.nn.functional as F
from torch import Tensor


def beside(size: tuple[int, int], low_res: Tensor | None, image: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """What the input channels hold beside the noisy image, in their order.

    size: (H, W) of the noisy image. image (B, 3, H, W) in [-1, 1] and mask (B, 1, H, W), 1 where it is to be kept:
    for inpainting networks. low_res: (B, 3, h, w) in [-1, 1], for upsamplers, enlarged bilinearly.
    """
    known = [] if image is None else [image * mask, mask]
    small = [] if low_res is None else [F.interpolate(low_res, size, mode="bilinear", align_corners=False)]
    return known + small
