"""What the sections of a recipe share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from calibquant.errors import RecipeError

Positive = Annotated[float, Field(gt=0)]
LARGEST = 2**63 - 1  # number that every library beneath takes
_Own = TypeVar("_Own", bound="Section")


class Section(BaseModel):
    """A part of the recipe: immutable; an unknown key, NaN and infinity are errors.

    `model_fields_set` holds the fields that the user's files and overrides set, and none that a preset sets.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, revalidate_instances="always"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's true equals 1, but is no number: it is refused as a text would be. So is what no int64 holds."""
        if isinstance(value, (list, tuple)):
            return [_plain(item) if isinstance(item, int) else item for item in value]
        kinds = list(_parts(cls.model_fields[info.field_name or ""].annotation))
        number = any(kind in (int, float) or type(kind) is int for kind in kinds)
        return _plain(value) if number and isinstance(value, int) else value


def _plain(value: int) -> int | str:
    """A number as it is, true and false as texts."""
    if abs(value) > LARGEST:
        raise ValueError(f"input should be at most {LARGEST}")
    return str(value) if isinstance(value, bool) else value


def conflict(field: str, problem: str, mend: str) -> PydanticCustomError:
    """What is wrong with two fields together; becomes a RecipeError at `field`."""
    return PydanticCustomError("conflict", "{problem}; {mend}", {"field": field, "problem": problem, "mend": mend})


def checked(section: _Own) -> _Own:
    """The section itself, if it is valid: a copy that was made with other values may not be.

    Raises:
        RecipeError: a field is not valid.
    """
    try:
        type(section).model_validate(section)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise RecipeError(
            f"{type(section).__name__}, {field}", problem["msg"], f"got {problem['input']!r:.60}"
        ) from None
    return section


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or None for a plain value."""
    kinds = _parts(field.annotation)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields of a section that hold plain values, those of optional sections included."""
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is None:
            yield prefix + name
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def given(section: Section, prefix: str = "") -> Iterator[str]:
    """The dotted names of the plain fields to which the user has given a value, in the order of the sections."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name in section.model_fields_set and isinstance(value, Section):
            yield from given(value, f"{prefix}{name}.")
        elif name in section.model_fields_set and value is not None:
            yield prefix + name


def keep_given(section: Section, tree: Mapping[str, Any]) -> None:
    """Take from `model_fields_set`, here and in the sections within, what a tree of fields does not hold."""
    section.model_fields_set.intersection_update(tree)
    for name in section.model_fields_set:
        value, inner = getattr(section, name), tree[name]
        if isinstance(value, Section) and isinstance(inner, Mapping):
            keep_given(value, inner)


def without_nulls(section: type[Section], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without those that are null and cannot be: such a one has the preset's value, or its default."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        field = section.model_fields.get(name)
        if field is not None and value is None and type(None) not in _parts(field.annotation):
            continue
        inner = None if field is None else section_of(field)
        found[name] = without_nulls(inner, value) if inner is not None and isinstance(value, dict) else value
    return found


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and what it is made of, but for what stands within lists and mappings."""
    yield annotation
    if getattr(annotation, "__origin__", None) not in (tuple, list, dict):
        for part in get_args(annotation):
            yield from _parts(part)
