"""The version of meo_hf, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("meo_hf")
except PackageNotFoundError:
    __version__ = "0+unknown"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import platform

    import torch
    import transformers

    return {
        "meo_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
