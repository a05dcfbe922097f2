"""What a process holds that has graphs of a bundle open and has run each once: its proportional set size, in bytes.

Run as a module of its own, so that nothing else is in the process: ``python -m tests.holds BUNDLE GRAPH...``
"""

from __future__ import annotations

import sys
from pathlib import Path

from tgate_engine.bundle import Bundle
from tgate_engine.manifest import resolve
from tgate_runtime.backends import backend


def main() -> None:
    bundle = Bundle.open(sys.argv[1], check_digests=False)
    engine = backend("ort-cpu", memory="shared")
    graphs = engine.load(bundle, sys.argv[2:])
    for name, graph in graphs.items():
        spec = bundle.manifest.graphs[name]
        inputs = {t.name: engine.allocate(resolve(t.shape, 1), t.dtype) for t in spec.inputs}
        outputs = {t.name: engine.allocate(resolve(t.shape, 1), t.dtype) for t in spec.outputs[:1]}
        graph.bind(inputs, outputs)()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    print(1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:"))))


if __name__ == "__main__":
    main()
