"""Options of a network: numbers within bounds.

Options come from manifests, and a manifest may be a stranger's: what is out of bounds is refused
with a sentence before a layer of that size is made.
"""

MAX_PARAMETERS = 1 << 30


def whole_number(name: str, value: object, least: int, most: int) -> int:
    """`value` as it is.

    Raises:
        ValueError: it is no whole number, or outside `least` to `most`.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ValueError(f"{name} must be a whole number from {least} to {most}, not {_short(value)}")


def probability(name: str, value: object) -> float:
    """`value` as a float from 0 up to, and without, 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ValueError(f"{name} must be at least 0 and less than 1, not {_short(value)}")


def refuse_giant(num_parameters: int) -> None:
    """Refuse a network that no machine this is made for could hold.

    Raises:
        ValueError: more than `MAX_PARAMETERS`, four gigabytes in fp32.
    """
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"it would have {num_parameters} parameters; {MAX_PARAMETERS} are allowed")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
