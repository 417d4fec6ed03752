"""The error tree and its exit codes.

    PipelineError                     1   a bug, or anything not named below
      UserError                       2   the user's file or flag; a full disk; a folder that can't be written
        ConfigError                       problems in pipeline.yaml or --set, all at once
        DataError                         problems in a table, all at once
        OutputError                       the output folder
        FineTuningNotSupportedError       this model can't be trained here and the fallback is off
        ModelSetConfigError               no model set can be made either
        ModelNotFoundError                a model name that means nothing here
      BackendError                    3   training, a server, the Hub, a git remote
        TrainingFailedError
        EngineError
        PushLostError                     somebody else pushed first; look again
      ArtifactError                   4   a damaged or missing artifact
      PrivacyError                    5   something would leave the machine that nobody allowed
    DatasetTooSmallWarning                a warning category

Catch `PipelineError` for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_PROBLEMS = 20
GATE_FAILED, GATE_INCONCLUSIVE = 100, 101
INTERRUPTED, TERMINATED = 130, 143


class PipelineError(Exception):
    """Base of all errors of this package. `hint` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UserError(PipelineError):
    exit_code = 2


class _Problems(UserError):
    """An error that names every problem found in one source, the first twenty in its message."""

    def __init__(self, source: str, problems: Sequence[str], *, hint: str = "") -> None:
        self.source, self.problems = source, tuple(problems)
        shown = [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            shown.append(f"  … and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__(f"{source}:\n" + "\n".join(shown), hint=hint)


class ConfigError(_Problems):
    """`source` is the file or flag; `problems` has one line each, naming the key."""


class DataError(_Problems):
    """`source` is the table; `problems` has one line each, naming row and column."""


class OutputError(UserError):
    """The output folder is full, read-only, or not a folder."""


class FineTuningNotSupportedError(UserError):
    """This model can't be trained on this machine, and the model set as a way out is switched off."""


class ModelSetConfigError(UserError):
    """Not even a model-set configuration can be made from these rows."""


class ModelNotFoundError(UserError):
    """The name of a base model leads to no file on this machine and to none that can be fetched."""


class BackendError(PipelineError):
    exit_code = 3


class TrainingFailedError(BackendError):
    """Training started and died: out of memory, a loss that is not finite."""


class EngineError(BackendError):
    """The engine that generates text failed as a whole (one bad row is a value, not an error)."""


class PushLostError(BackendError):
    """Somebody else's push was faster, so that nothing of this one was done."""


class ArtifactError(PipelineError):
    exit_code = 4


class PrivacyError(PipelineError):
    exit_code = 5


class DatasetTooSmallWarning(UserWarning):
    """Fewer usable rows than fine-tuning can learn from."""
