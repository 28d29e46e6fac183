"""What the parts of a recipe are made of: the base class, strict field types, contradictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict, ValidationInfo
from pydantic_core import PydanticCustomError


class Spec(BaseModel):
    """A frozen mapping of a recipe that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def _fill(self, **values) -> None:
        """Defaults that depend on other fields. They stay unset: ``exclude_unset`` leaves them out."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


def refuse(problems: Sequence[tuple[str, str]]) -> None:
    """Raises when there are ``problems``: (dotted path inside the mapping, what is wrong and what to do)."""
    if problems:
        text = "; ".join(f"{path}: {said}" for path, said in problems)
        raise PydanticCustomError("contradiction", "{text}", {"text": text, "problems": list(problems)})


def _not_bool(value):
    if isinstance(value, bool):  # Python counts True as 1; a recipe does not
        raise PydanticCustomError("float_type", "Input should be a number")
    return value


def _from_folder(value: str, info: ValidationInfo) -> str:
    """Absolute, from the recipe's folder; as it is where no folder is known."""
    folder = (info.context or {}).get("folder")
    path = os.path.expanduser(value)  # Path's raises where there is no such user
    return path if folder is None else str(Path(folder, path).absolute())


def _function_from_folder(value: str, info: ValidationInfo) -> str:
    path, colon, name = value.rpartition(":")
    if not colon or not path or not name.isidentifier():
        raise PydanticCustomError("function", "a file and its function, such as rewards.py:my_reward")
    return f"{_from_folder(path, info)}:{name}"


Int = Annotated[int, Strict()]
Float = Annotated[float, Strict(), BeforeValidator(_not_bool)]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]
FilePath = Annotated[Str, AfterValidator(_from_folder)]
FunctionPath = Annotated[Str, AfterValidator(_function_from_folder)]
