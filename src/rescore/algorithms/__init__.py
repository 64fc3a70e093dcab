"""One method, one file: hyper-parameters, record, credit and loss."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from rescore.algorithms.base import Algorithm


def algorithms() -> dict[str, type[Algorithm]]:
    """Every algorithm by the name of its module: found by walking this package."""
    found: dict[str, type[Algorithm]] = {}
    for module in pkgutil.iter_modules(__path__):
        content = importlib.import_module(f"{__name__}.{module.name}")
        for _, item in inspect.getmembers(content, inspect.isclass):
            if item.__module__ != content.__name__ or inspect.isabstract(item):
                continue
            if issubclass(item, Algorithm):
                found[module.name] = item
    return found
