"""What the sections of a recipe share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def conflict(field: str, problem: str, mend: str) -> PydanticCustomError:
    """What is wrong with two fields together; becomes a RecipeError at `field`."""
    return PydanticCustomError("conflict", "{problem}; {mend}", {"field": field, "problem": problem, "mend": mend})
