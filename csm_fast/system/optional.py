"""Import peft and bitsandbytes quietly, and say how to install them."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from csm_fast.system.errors import InputError

INSTALL = "pip install -e '.[qlora]'"


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import bitsandbytes, or PEFT, which imports it, without downloads, foreign code and warnings.

    If the package ``kernels`` is installed, importing bitsandbytes downloads a kernel from the hub and runs it. If not,
    every import logs a warning about that.
    """

    def unrelated(record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward" not in record.getMessage()

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hidden = "kernels" not in sys.modules and "bitsandbytes" not in sys.modules
    logger.addFilter(unrelated)
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            if importlib.util.find_spec("bitsandbytes") is not None:
                importlib.import_module("bitsandbytes")
            yield
    finally:
        if hidden:
            sys.modules.pop("kernels", None)
        logger.removeFilter(unrelated)


def load_bitsandbytes() -> Any:
    """The module ``bitsandbytes``; an ``InputError`` if it is not installed, or does not load on this machine."""
    loaded = sys.modules.get("bitsandbytes")
    if hasattr(loaded, "nn"):  # completely. Autograd's threads call this, too, and must not change warning filters
        return loaded
    try:
        with quiet_import():
            return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"4-bit weights need bitsandbytes ({error})", mend=INSTALL) from None


def load_peft() -> Any:
    """The module ``peft``; an ``InputError`` if it is not installed."""
    try:
        with quiet_import():
            peft = importlib.import_module("peft")
            importlib.import_module("peft.tuners.lora")  # imports bitsandbytes where it is installed
            return peft
    except ImportError as error:
        raise InputError(f"adapters need PEFT ({error})", mend=INSTALL) from None
