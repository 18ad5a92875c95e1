"""Errors that a user can act on, and how they count.

A message names the run, what was found, what is needed and what to do, on one line. Anything
that is not a `KeepstillError` is a defect of ours and ends in a traceback.
"""


class KeepstillError(Exception):
    """Base of every error that is the user's to mend."""


class InputError(KeepstillError, ValueError):
    """A run, a sidecar or a study that cannot be read as what it claims to be."""


class SettingsError(KeepstillError, ValueError):
    """A setting that is unknown, of the wrong kind or out of range."""


class StageError(KeepstillError, OSError):
    """The stage root cannot hold what is asked of it."""


class OutputError(KeepstillError, OSError):
    """An output cannot be written, or is not what was written."""


class LaunchError(KeepstillError, RuntimeError):
    """The ranks that run are not the ranks that were asked for."""


class PackageError(KeepstillError, ImportError):
    """A package that the settings ask for is not installed."""


class EmptyVolumeError(KeepstillError, ValueError):
    """A volume or reference without signal."""


def counted(number: int, noun: str) -> str:
    """A number and what it counts: ``1 run``, ``2 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
