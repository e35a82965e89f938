"""The version that was installed: of the tag it was built from, or counted on from the last one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("sparse-fcmae")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"
