"""Loss scaling for networks in float16: the loss goes back multiplied, so that small gradients do not round to zero.

The factor is a power of two and is taken off at the end, so nothing is rounded by it (Micikevicius et al. 2018, Mixed
Precision Training, section 3.2, where it is constant). It is halved whenever a gradient overflows, and doubled after
many that did not, as torch.amp.GradScaler's is.
"""

import torch

START, LARGEST = 2.0**16, 2.0**24
GROWS_AFTER = 500  # updates without an overflow


def first_scale(*dtypes: torch.dtype) -> float | None:
    """What a training through networks of these dtypes starts with; None if they need no scaling."""
    return START if torch.float16 in dtypes else None


def after_overflow(scale: float | None) -> float | None:
    """Half of it, at least 1."""
    return None if scale is None else max(1.0, scale / 2)


def after_updates(scale: float | None, clean: int) -> tuple[float | None, int]:
    """The scale and the count of updates since its last change, once `clean` of them had no overflow."""
    if scale is None or clean < GROWS_AFTER:
        return scale, clean
    return min(LARGEST, 2 * scale), 0
