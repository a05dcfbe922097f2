"""onnxruntime-gpu for one kind of GPU, in parts that are small enough to bring to a machine without a network.

    python -m benchmarks.gpu.pack --python 3.12 --architecture 90 --part-mib 33 --output FOLDER
    cat FOLDER/*/part.* | tar -xJ -C SITE && PYTHONPATH=SITE python -c 'import onnxruntime'

The wheel's CUDA provider holds kernels of every architecture. All but one are overwritten with zeros, which compress to
nothing; what inference does not need is left out; and the archive is cut, each part in a folder of its own. Needs pip,
readelf and tar.

Kernels lie in the section ``.nv_fatbin``, in regions of a 16-byte header (magic number, header bytes, body bytes) and
entries (kind, header bytes, payload bytes, architecture); kind 2 is machine code.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_MAGIC = 0xBA55ED50
_MACHINE_CODE = 2
_LEFT_OUT = (
    *("/transformers/", "/tools/", "/quantization/", "/backend/", "/datasets/"),
    *("providers_tensorrt", "capi/libonnxruntime.so"),  # the Python module holds a copy of the latter
)


def keep(data: bytearray, at: int, end: int, architecture: int) -> int:
    """Overwrite the payload of every kernel between two offsets that is not machine code of an architecture; how many
    bytes of such code there are."""
    kept = 0
    while at < end - 16:
        magic, _, header, body = struct.unpack_from("<IHHQ", data, at)
        if magic != _MAGIC:
            at += 8  # regions are aligned so
            continue
        entry, at = at + header, at + header + body
        while entry < at:
            kind, _, own_header, payload = struct.unpack_from("<HHIQ", data, entry)
            (own,) = struct.unpack_from("<I", data, entry + 28)
            entry += own_header
            if (kind, own) == (_MACHINE_CODE, architecture):
                kept += payload
            else:
                data[entry : entry + payload] = bytes(payload)
            entry += payload
    return kept


def _kernels(library: Path) -> tuple[int, int]:
    """Where a library's kernels begin and end."""
    told = subprocess.run(["readelf", "-S", "-W", library], capture_output=True, text=True, check=True).stdout
    for line in told.splitlines():
        if ".nv_fatbin " in line:
            words = line.replace("[", " ").replace("]", " ").split()
            kind = words.index("PROGBITS")
            begin, size = int(words[kind + 2], 16), int(words[kind + 3], 16)
            return begin, begin + size
    raise SystemExit(f"{library.name} has no section .nv_fatbin: it is no CUDA library, or laid out in a new way")


def main() -> None:
    """Download, cut down, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of the machine that it is for")
    parser.add_argument("--architecture", type=int, default=90, help="of its GPU: 90 is H100 and H200")
    parser.add_argument("--version", default="1.31.1")
    parser.add_argument("--part-mib", type=int, default=33)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheels, site = Path(scratch, "wheels"), Path(scratch, "site")
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27)]
        what = ["--python-version", args.python, "--implementation", "cp", *platforms, "--only-binary=:all:"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run([*pip, *what, f"onnxruntime-gpu=={args.version}"], check=True)
        with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
            wheel.extractall(site, [name for name in wheel.namelist() if not any(out in name for out in _LEFT_OUT)])
        library = site / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
        data = bytearray(library.read_bytes())
        kept = keep(data, *_kernels(library), args.architecture)
        if not kept:
            raise SystemExit(f"{library.name} holds no kernel for sm_{args.architecture}")
        library.write_bytes(data)
        print(f"{library.name}: {kept / 2**20:.1f} MiB of kernels for sm_{args.architecture}")
        archive = Path(scratch, "archive")
        subprocess.run(["tar", "-C", site, "-cJf", archive, "."], check=True)
        packed, size = archive.read_bytes(), args.part_mib * 2**20
    for number, begin in enumerate(range(0, len(packed), size)):
        part = args.output / f"p{number}" / f"part.{number:02}"
        part.parent.mkdir()
        part.write_bytes(packed[begin : begin + size])
        print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
