"""The errors a user may meet: one family, each saying what happened and what to do next."""


class SafeSteerError(Exception):
    """Something the user can act on.

    Args:
        message: what happened, one sentence.
        hint: what to do next, one sentence; empty where the message already says it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(SafeSteerError):
    """A flag, setting or file the user gave is wrong; exit code 2."""


class ConfigError(UsageError):
    """The configuration has problems; all of them are listed in the message."""


class PromptError(UsageError):
    """A prompt file is missing, empty or malformed."""


class ModelError(SafeSteerError):
    """A model cannot be found, read, or used for this method."""


class DiskSpaceError(SafeSteerError):
    """There is not enough room to write what must be written."""


class SelfCheckError(SafeSteerError):
    """The loaded model does not behave as the method needs; going on would train on wrong figures."""


class DirectionError(SafeSteerError):
    """No usable refusal direction was found; the message reports the best candidates and what each failed."""


class WeakRefusalError(DirectionError):
    """The model refuses too little to have a refusal direction of its own; the wizard asks what to do."""


REFUSES_TOO_LITTLE = 3
"""The exit code of a command that ends so."""


class TrainingError(SafeSteerError):
    """Training cannot go on; the steps saved before stay."""


class ExportError(SafeSteerError):
    """Weights could not be merged or written, or the written weights failed their check."""


class RunFolderError(SafeSteerError):
    """A run folder is missing, damaged, or in use by another process."""


class Interrupted(SafeSteerError):
    """The user asked to stop; everything done so far is saved. Exit code 130."""
