"""Makes anew what ships of the bundle `mini`, from an export: all its files but the weights, and the head of those.

tgate-export --model mini-pixart --output bundles/mini --force
python scripts/ship_mini.py bundles/mini
"""

from __future__ import annotations

import shutil
import struct
import sys
import tempfile
from pathlib import Path

from tgate_engine.bundle import Bundle
from tgate_runtime.mini import HEAD_FILE, MINI, MODELS, assemble


def main(exported: str, output: Path = MODELS / MINI) -> None:
    """Replace what ships by that bundle's. Raises ``BundleError``, and replaces nothing, where it would not come out
    again as it is."""
    bundle = Bundle.open(exported)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as whole:
        shipped = Path(made, MINI)
        weights = bundle.manifest.weights
        shutil.copytree(bundle.path, shipped, ignore=shutil.ignore_patterns(weights), copy_function=shutil.copyfile)
        with bundle.file(weights).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            file.seek(0)
            (shipped / HEAD_FILE).write_bytes(file.read(8 + length))
        assemble(shipped, Path(whole))
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(shipped, output, copy_function=shutil.copyfile)
    print(f"{output}: {sum(path.stat().st_size for path in output.rglob('*') if path.is_file())} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:2])
