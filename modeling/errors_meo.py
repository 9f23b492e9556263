"""Errors of the MEO model code; each is also the builtin error that a caller would expect."""


class MeoError(Exception):
    """Base of all errors that this code raises on purpose."""


class MeoConfigError(MeoError, ValueError):
    """A `meo` block or a load option is invalid; the message says which and what is allowed."""


class ReferenceSourceError(MeoError, OSError):
    """The weights that a model refers to are not pinned, not there, or not the ones it was made for."""


class RoutingError(MeoError, ValueError):
    """The inputs of a forward pass do not say which tokens share a gate."""


class RoutingContextError(MeoError, RuntimeError):
    """A merged feed-forward was called outside the forward pass of its model."""
