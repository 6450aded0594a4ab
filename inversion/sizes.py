"""Sizes of memory, as people write and read them."""

import math
import re

from inversion.errors import InversionError

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def parsed(text: str) -> int:
    """The bytes of a size such as 6GiB, 1.5 GiB or 800MiB; GB and MB are powers of ten.

    Raises InversionError for anything else, and for a size of nothing.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]+)", text.strip(), re.IGNORECASE)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if not match or match[2].lower() not in units:
        raise InversionError(f"{text!r} is no size of memory: write a number and a unit, like 6GiB or 800MiB")
    found = float(match[1]) * units[match[2].lower()]
    if math.isinf(found):
        raise InversionError(f"{text[:20]}… is more memory than there is: write a size like 6GiB")
    if not (found := int(found)):
        raise InversionError(f"{text} is no memory at all: write a size like 6GiB")
    return found


def size(count: int) -> str:
    """Bytes as text: KiB below one MiB, MiB below one GiB, hundredths of a GiB from there on; rounded up, so that what
    is needed fits into what was read here and is given as a budget.
    """
    kib, mib, hundredths = (-(-count * parts // unit) for parts, unit in ((1, 2**10), (1, 2**20), (100, 2**30)))
    if kib < 2**10:
        return f"{kib} KiB"
    return f"{mib} MiB" if mib < 2**10 else f"{hundredths // 100}.{hundredths % 100:02} GiB"
