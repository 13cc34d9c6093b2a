"""ssod_fast: fast ops and training methods for semi-supervised object detection."""

from importlib.metadata import PackageNotFoundError, version

from . import ops as ops

try:
    __version__ = version("ssod_fast")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"
