"""Settings of studies: bits of weights and activations."""

from __future__ import annotations

import re
from typing import get_args

from calibquant.errors import RecipeError
from calibquant.recipe import Bits, GridKind, WeightRecipe, has_bits


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


def grid_bits(weights: WeightRecipe, grid: GridKind, wanted: int) -> int | None:
    """What `quant.weights.bits` is to be so that codes on a grid take the bits that a setting names.

    Args:
        weights: the recipe's section, which may give a number of levels.
        grid: the grid of the weights.
        wanted: bits of a stored code.

    Returns:
        the bits; None where the grid has no such codes.

    Example:
        >>> [grid_bits(WeightRecipe(), grid, bits) for grid, bits in (("apot", 4), ("apot", 8), ("nuq", 5))]
        [4, None, 8]
    """
    bits = 8 if grid == "nuq" else wanted
    if not has_bits(grid, bits):
        return None
    levels = weights.levels if grid in ("codebook", "nuq") else None
    own = WeightRecipe.model_validate({"grid": grid, "bits": bits, "levels": levels})
    return bits if own.code_bits == wanted else None
