"""A hook of mkdocs: what the site says of the version that it documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


def on_config(config: Any) -> Any:
    """Put the version of the package into the footer."""
    package = Path(config["config_file_path"]).parent / "src" / "mada_optim" / "__init__.py"
    version = _VERSION.search(package.read_text("utf-8")) if package.exists() else None
    if version is not None:
        config["copyright"] = f"mada-optim {version[1]}, Apache License 2.0"
    return config
