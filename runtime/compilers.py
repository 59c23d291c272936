"""Find the C++ compiler: ``CXX`` if set, else g++, clang++ or c++ on the path."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

from .errors import MissingCompiler


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answers. command: argument vector to start it; version: its first line."""

    command: tuple[str, ...]
    version: str


def remedy() -> str:
    """How to get a C++ compiler on this kind of machine."""
    if sys.platform == "darwin":
        return "run `xcode-select --install`, or set CXX to a C++17 compiler"
    if sys.platform == "win32":
        return "install the Visual Studio build tools or LLVM, or set CXX to a C++17 compiler"
    return "install g++ or clang++ (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`), or set CXX"


def find_cxx() -> Compiler:
    """The C++ compiler. Raises :class:`~.errors.MissingCompiler` saying what was tried and how to get one."""
    return _find(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=8)
def _find(cxx: str, path: str) -> Compiler:
    tried = []
    for candidate in [cxx] if cxx.strip() else ["g++", "clang++", "c++"]:
        command = shlex.split(candidate)
        program = shutil.which(command[0], path=path)
        if program is None:
            tried.append(f"{candidate}: not found")
            continue
        try:
            run = subprocess.run([program, *command[1:], "--version"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            tried.append(f"{candidate}: {error}")
            continue
        if run.returncode == 0 and run.stdout.strip():
            return Compiler((program, *command[1:]), run.stdout.splitlines()[0].strip())
        tried.append(f"{candidate} --version: exit status {run.returncode}")
    raise MissingCompiler(f"there is no C++ compiler ({'; '.join(tried)}): {remedy()}")
