"""Config files written for a test, and the errors they give."""

from pathlib import Path

import pytest
import yaml

from utils import Config, load_config

MINIMAL = {"save_path": "out", "coconut": True, "train_path": "train.json", "val_path": "valid.json"}


def errors(tmp_path: Path, values: dict | str, *overrides: str) -> str:
    """The message with which a YAML file of these values is refused."""
    path = tmp_path / "x.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    with pytest.raises(ValueError) as refused:
        load_config(path, overrides)
    message = str(refused.value)
    assert "\n" not in message, "an error is one line"
    assert str(path) in message, "it names the file"
    return message


def config_of(tmp_path: Path, values: dict | str, *overrides: str, file: str = "x.yaml") -> Config:
    path = tmp_path / file
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return load_config(path, overrides)
