"""Errors of meo_hf; each is also the builtin error that a caller would expect."""

from meo_hf.modeling.errors_meo import (
    MeoConfigError,
    MeoError,
    ReferenceSourceError,
    RoutingContextError,
    RoutingError,
)

__all__ = [
    "CheckFailedError",
    "CheckpointError",
    "HubError",
    "LicenseError",
    "LoginError",
    "MeoConfigError",
    "MeoError",
    "OutputError",
    "ReferenceSourceError",
    "RoutingContextError",
    "RoutingError",
    "SourceError",
    "UnsupportedError",
    "UsageError",
]


class UsageError(MeoError, ValueError):
    """An option's value, or a combination of options, makes no sense."""


class SourceError(MeoError, OSError):
    """The source cannot be found, fetched or read."""


class CheckpointError(SourceError):
    """The source's files are there, but damaged or inconsistent."""


class UnsupportedError(MeoError, ValueError):
    """The source is sound, but cannot be converted."""


class OutputError(MeoError, OSError):
    """The output cannot be written: it exists, there is no space, or no permission."""


class LicenseError(MeoError, ValueError):
    """The licences of the sources contradict each other."""


class LoginError(MeoError, PermissionError):
    """The Hub would refuse a push: nobody is logged in, or the token is wrong."""


class HubError(MeoError, ConnectionError):
    """Pushing to the Hub failed; the local output is complete."""


class CheckFailedError(MeoError, AssertionError):
    """A check failed: of a conversion that was written, or of what a benchmark was about to time."""
