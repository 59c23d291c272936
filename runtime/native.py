"""Native code of the runtime itself, made ready without anybody waiting for it.

It goes through the kernel loader like any kernel, so it is cached, locked and named by its content. Where it is in
the cache already it is loaded at first use; else a thread builds it while its users do without.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..codegen.spec import KernelSpec
from . import load, settings
from .announce import announce
from .errors import TilewrightError

_log = logging.getLogger("tilewright.native")
Made = TypeVar("Made")


class NativeModule(Generic[Made]):
    """One piece of native code.

    spec: what is built for target ``cpp``. make: turns the loaded kernel's ``launch`` into what users get; called once.
    without: what it means when it cannot be built, the beginning of the sentence that announces it.
    """

    def __init__(self, spec: KernelSpec, make: Callable[[Callable[..., Any]], Made], without: str) -> None:
        self.spec = spec
        self.made: Made | None = None
        self.problem: str | None = None
        self._make = make
        self._without = without
        self._lock = threading.RLock()
        self._builder: threading.Thread | None = None
        self._missing = False
        settings.on_change(self._retry)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _retry(self) -> None:
        self.problem = None
        self._missing = False

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        self._builder = None

    def get(self, start: bool = True) -> Made | None:
        """What :meth:`make` made, or None while it is being built or when it cannot be. Never waits for a build.

        start: build it in the background when it is not in the cache. Without, the cache is looked at once only.
        """
        if self.made is not None or self.problem is not None or self._builder is not None:
            return self.made
        if self._missing and not start:
            return None
        if not self._lock.acquire(blocking=False):  # somebody is waiting for a build
            return self.made
        try:
            if self._builder is None and not self._open(build=False):
                self._missing = True
                if start:
                    self._builder = threading.Thread(
                        target=self._build, name=f"tilewright-{self.spec.kind}", daemon=True
                    )
                    self._builder.start()
        finally:
            self._lock.release()
        return self.made

    def wait(self) -> Made | None:
        """What :meth:`make` made, built now if need be; None when it cannot be."""
        with self._lock:
            if self.made is None and self.problem is None:
                self._open(build=True)
        return self.made

    def _build(self) -> None:
        self.wait()
        self._builder = None

    def _open(self, build: bool) -> bool:
        """Whether there is nothing left to do. Holds the lock."""
        if self.made is not None:
            return True
        try:
            kernel = load.load(self.spec, "cpp") if build else load.try_load(self.spec, "cpp")
            if kernel is None:
                return False
            self.made = self._make(kernel.launch)
        except (TilewrightError, OSError) as error:
            self.problem = str(error)
            _log.info("%s is not available: %s", self.spec.kind, error)
            announce(f"{self._without}: {error}", key=f"native:{self.spec.kind}")
        return True
