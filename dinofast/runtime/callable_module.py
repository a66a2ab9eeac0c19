"""A module that can be called like the function it is named after."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    _function: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return importlib.import_module, (self.__name__,)  # for processes that get it pickled


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """`package.name` is the module of that name once it has been imported, whatever the package
    calls so: from now on calling it calls the function."""
    module = sys.modules[name]
    module.__class__ = CallableModule
    module._function = function  # type: ignore[attr-defined]
    module.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
