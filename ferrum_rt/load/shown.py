"""Numbers as people read them: three digits, and a unit that makes them short."""

import math


def seconds(value: float) -> str:
    """``51.2 µs``, ``12.3 ms``, ``4.56 s``; a dash for a time that there is not."""
    if math.isnan(value):
        return "-"
    for unit, least in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= least:
            return f"{_digits(value / least)} {unit}"
    return f"{_digits(value * 1e6)} µs" if value else "0 s"


def rate(value: float) -> str:
    """``0.123``, ``45.6``, ``7,890``."""
    return _digits(value)


def share(value: float) -> str:
    """``98.7 %``; of what is nearly all it does not say that it is all."""
    percent = 100 * value
    return f"{percent:.3f} %" if 0 < 100 - percent < 0.05 else f"{percent:.1f} %"


def count(value: float) -> str:
    """``1,234``."""
    return f"{value:,}"


def plain(value: float) -> str:
    """As it was given."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digits(value: float) -> str:
    if not value:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"
