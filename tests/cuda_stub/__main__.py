"""``python -m tests.cuda_stub ...``: Python with those arguments, for which the stub is CUDA.

The stub is built into ``build/cuda_stub`` where it is not yet. A script reads what was asked of the GPU with
:func:`tests.cuda_stub.log.recorded`.
"""

from __future__ import annotations

import os
import sys

from tests.cuda_stub.build import HERE, built


def main() -> None:
    folder = built(HERE.parents[1] / "build" / "cuda_stub")
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(paths)  # read when a process starts
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
