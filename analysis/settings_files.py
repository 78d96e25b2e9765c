"""Settings of an analysis: a YAML file, and the strict pydantic model that it must fit.

values = read_yaml(Path("args/lahr_factorial.yaml"), "factorial config")
study = checked(FactorialConfig, values, "args/lahr_factorial.yaml")          # ValueError with all problems in one line
"""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, what: str = "config") -> dict:
    """The keys of a YAML file. ValueError where there is none, or it is no YAML of `key: value` lines."""
    if not path.is_file():
        raise ValueError(f"{what} {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold `key: value` lines with words as keys")
    return values


def checked(kind: type[Model], values: dict, source: str | Path) -> Model:
    """Values as a model of `kind`. ValueError that names the source and every problem."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ValueError(f"{source}: {explained(error)}") from None


def explained(error: ValidationError) -> str:
    """Each problem once: the key, what is wrong, and the value where it is not missing or unknown."""
    return "; ".join(dict.fromkeys(_explained(item) for item in error.errors()))


def _explained(item: dict) -> str:
    key, said = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if item["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {said[0].lower()}{said[1:]}, got {item['input']!r:.60}"
