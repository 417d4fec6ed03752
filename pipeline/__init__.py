"""Fine-tune a small model on expert-rated records, compare it with its base, version and document the result.

Importing the package costs nothing; the public names load on use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import PipelineConfig, load_config
    from pipeline.fine_tuner import FineTuner

__version__ = "0.1.0"
__all__ = ["FineTuner", "PipelineConfig", "__version__", "load_config"]

_HOME = {"FineTuner": "fine_tuner", "PipelineConfig": "config", "load_config": "config"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"pipeline.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
