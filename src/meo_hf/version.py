"""The version of meo_hf, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("meo_hf")
except PackageNotFoundError:
    __version__ = "0+unknown"
