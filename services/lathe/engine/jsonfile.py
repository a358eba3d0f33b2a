"""JSON files of models and adapters, as people bring them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lathe.common.errors import InvalidArgument


def read_object(path: Path) -> dict[str, Any]:
    """The one object that the file holds. Raises InvalidArgument naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"{path.name} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InvalidArgument(f"{path.name} is not JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidArgument(f"{path.name} is nested too deeply.") from error
    if not isinstance(content, dict):
        raise InvalidArgument(f"{path.name} must hold a JSON object.")
    return content
