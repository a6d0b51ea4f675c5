"""Packages that only some users have."""

import importlib


def optional(name: str, install: str, purpose: str):
    """The module. ValueError with what to install, if it is missing. install: as pip takes it; purpose: who needs it"""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{purpose} needs {error.name or name}: pip install {install}") from error
