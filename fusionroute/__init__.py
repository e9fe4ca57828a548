"""FusionRoute: several specialised language models write one answer together, token by token."""

from importlib.metadata import version

__version__ = version("fusionroute")
