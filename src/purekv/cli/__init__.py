"""The command line. Imports no torch until a verb runs, so that --help is instant."""

from purekv.cli.app import main

__all__ = ["main"]
