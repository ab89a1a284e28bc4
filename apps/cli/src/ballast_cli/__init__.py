"""The command `ballast`: one sub-command group per package."""

from importlib.metadata import version

__version__ = version("ballast-cli")
