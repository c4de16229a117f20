"""Settings of studies: bits of weights and activations."""

from __future__ import annotations

import re
from typing import get_args

from calibquant.errors import RecipeError
from calibquant.recipe import Bits


def parse_setting(text: str, where: str) -> tuple[int, int]:
    """Bits of weights and activations from a text such as w4a4; one bit is for weights.

    Args:
        text: the setting.
        where: the command, for the error.

    Raises:
        RecipeError: it is none.

    Example:
        >>> parse_setting("w4a8", "calibquant compare")
        (4, 8)
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"{where}, bits", f"'{text}' is no setting", "write for example w4a4,w2a2")
    allowed = get_args(Bits)
    for place, number in enumerate(map(int, match.groups())):
        if number not in allowed and (place, number) != (0, 1):
            mend = f"use {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}"
            raise RecipeError(f"{where}, bits", f"'{text}' asks for {number} bits, which no grid has", mend)
    return int(match[1]), int(match[2])
