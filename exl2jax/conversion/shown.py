"""Numbers as a person reads them."""

LONGEST = 1e7
"""The least number that is shown with an exponent, since its digits would be too many to read."""


def shown(value: float, digits: int) -> str:
    """A number with some digits after the point, or as `1.3e+127` where it would be too long to read."""
    return f"{value:.1e}" if abs(value) >= LONGEST else f"{value:.{digits}f}"
