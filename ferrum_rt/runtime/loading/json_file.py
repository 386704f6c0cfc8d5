"""The JSON files of a model's directory."""

import json
from pathlib import Path
from typing import Any

from ferrum_rt.interfaces.errors import FerrumError


def read_json(path: Path, kind: type[FerrumError]) -> dict[str, Any]:
    """The object in the file. What is wrong with it is raised as ``kind``, with the file's name."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise kind(f"{path}: no such file; a model is a directory in Hugging Face's layout") from error
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise kind(f"{path}: expected a JSON object")
    return content
