"""Code that libraries would fetch and run by themselves: it is kept out."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast


def forbid_hub_kernels() -> None:
    """Make the package `kernels`, which fetches native code from the model hub, one that cannot be imported here.

    Where it is installed, bitsandbytes asks it for a faster routine as soon as it is imported on some processors, and
    transformers for attention that a model's settings name. All of them do without where it cannot be imported. It counts
    for the whole process, and has to come before those libraries.
    """
    # The import system takes None for a module that is known not to be there.
    cast(dict[str, ModuleType | None], sys.modules)["kernels"] = None
