"""Finds the compiled half of a module, where one was built of these sources: plain C, called by ctypes.

Every such half is optional and gives the bits of the Python beside it, so all that can be wrong with one is that it
is not there. Whether this processor can run it is for the caller to ask of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Function", "compiled_library"]

Function: TypeAlias = tuple[Any, Sequence[Any]]
"""What a function of C answers and what it is given, as ctypes types; None for no answer."""


def compiled_library(
    module: str, stem: str, functions: Mapping[str, Function], *, version: str, wanted: int
) -> ctypes.CDLL | None:
    """The library beside the Python file `module` whose name begins with `stem`, its functions typed.

    version: which of the functions tells of what sources it is; `wanted`: of which it must be. None where it was not
    built, or is of another processor or other sources.
    """
    for path in sorted(Path(module).parent.glob(f"{stem}*.so")):
        try:
            library = ctypes.CDLL(str(path))
            for name, (answer, given) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = answer, given
        except (OSError, AttributeError):  # of another processor or another version of these sources
            continue
        if getattr(library, version)() == wanted:
            return library
    return None
