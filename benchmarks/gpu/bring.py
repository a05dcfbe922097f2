"""A bundle of random weights without them, and the weights made again: to bring SDXL's 5 GB as 3 MB.

    python -m benchmarks.gpu.bring thin BUNDLE FOLDER      # where it was exported
    python -m benchmarks.gpu.bring whole FOLDER BUNDLE     # where it is wanted: half a minute on 16 cores

Random weights are the same for the same component and key, and a weight file's header names both. The second command
ends with an error where what it made is not, by its digest, what the manifest was written for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tgate_engine.bundle import Bundle
from tgate_export.checkpoints.published import random_tensor

_HEADER = "weights.header"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def thin(bundle: Path, folder: Path) -> None:
    """Copy all but the weights, of which the header is kept."""
    weights = Bundle.open(bundle, check_digests=False).manifest.weights
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns(weights))
    with (bundle / weights).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(0)
        (folder / _HEADER).write_bytes(file.read(8 + length))


def whole(folder: Path, bundle: Path) -> None:
    """Copy what was kept, and make the weights."""
    shutil.copytree(folder, bundle, ignore=shutil.ignore_patterns(_HEADER))
    head = (folder / _HEADER).read_bytes()
    named = {name: facts for name, facts in json.loads(head[8:]).items() if name != "__metadata__"}
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    path = bundle / str(manifest["weights"])
    torch.set_num_threads(1)  # each tensor is one thread's
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + max(facts["data_offsets"][1] for facts in named.values()))
        file.flush()
        to = file.fileno()

        def make(name: str) -> None:
            facts = named[name]
            component, _, key = name.removesuffix("^T").partition(".")
            shape = facts["shape"]
            tensor = random_tensor(component, key, tuple(reversed(shape)) if name.endswith("^T") else tuple(shape))
            tensor = tensor.to(_DTYPES[facts["dtype"]])
            data = (tensor.t() if name.endswith("^T") else tensor).contiguous().reshape(-1).view(torch.uint8).numpy()
            os.pwrite(to, memoryview(data), len(head) + facts["data_offsets"][0])

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(make, sorted(named, key=lambda name: -named[name]["data_offsets"][1])))
    with path.open("rb") as made:
        if hashlib.file_digest(made, "sha256").hexdigest() != manifest["files"][manifest["weights"]]["sha256"]:
            raise SystemExit(f"{path} is not what {folder} was exported with: another PyTorch draws other numbers")


def main() -> None:
    """One of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("thin", "whole"))
    parser.add_argument("source", type=Path)
    parser.add_argument("to", type=Path, help="a folder that is not there yet")
    args = parser.parse_args()
    (thin if args.what == "thin" else whole)(args.source, args.to)


if __name__ == "__main__":
    main()
