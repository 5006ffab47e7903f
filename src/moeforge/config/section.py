"""What the sections of the training file are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


def with_tuples(value: Any) -> Any:
    """Lists as tuples, which strict validation wants."""
    if isinstance(value, dict):
        return {key: with_tuples(item) for key, item in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value


def expanded(name: str) -> Path:
    """A path with its ~; one of nobody's home stays as it is."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def refuse(key: str, value: object, reason: str) -> PydanticCustomError:
    """The error of a check over several keys; `toml.py` prints it as one line."""
    return PydanticCustomError("check", "{line}", {"line": f"{key} = {value}: {reason}"})


class Section(BaseModel):
    """Frozen, strict (no numbers in quotes), finite, and without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
