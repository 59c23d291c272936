"""Type-check the package: ``python scripts/check_types.py [mypy options]``.

mypy finds modules by folder, and the stage folders are not below ``tilewright/``. So the layout of the installed
package is built from symbolic links in ``build/types``, mypy reads that, and its messages name the real files.
The public modules are checked strictly (every function annotated), the rest leniently.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from mypy import api

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "types"
STAGES = ("frontend", "passes", "runtime", "codegen", "benchmarks")


def build_tree() -> Path:
    """Lay out ``build/types/tilewright`` and return it. Links are relative, so that the checkout may move."""
    package = TREE / "tilewright"
    shutil.rmtree(TREE, ignore_errors=True)
    package.mkdir(parents=True)
    targets = [*(ROOT / "tilewright").glob("*.py"), ROOT / "tilewright" / "py.typed", *(ROOT / s for s in STAGES)]
    for target in targets:
        (package / target.name).symlink_to(os.path.relpath(target, package))
    return package


def main(arguments: list[str]) -> int:
    build_tree()
    os.environ["MYPYPATH"] = str(TREE)
    os.chdir(ROOT)
    output, errors, status = api.run(["--config-file", "pyproject.toml", *arguments, "-p", "tilewright"])
    # Messages name the file as it lies in the checkout.
    stages = "|".join(STAGES)
    output = re.sub(rf"(?m)^build/types/tilewright/({stages})/", r"\1/", output)
    output = re.sub(r"(?m)^build/types/", "", output)
    print(output, end="")
    print(errors, end="", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
