"""What a process holds, in bytes of its proportional set size, as JSON; in a process with nothing else in it.

``python -m tests.holds BUNDLE graphs full reuse_self``: after each of the graphs has run once.
``python -m tests.holds BUNDLE plan default``: after a whole run of the plan. Weights are shared.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from benchmarks.memory import proportional_bytes
from tgate_engine.bundle import Bundle
from tgate_engine.manifest import resolve
from tgate_runtime.backends import backend
from tgate_runtime.binding import Binding
from tgate_runtime.runner import run
from tgate_runtime.session import Session


def main() -> None:
    path, what, *names = sys.argv[1:]
    bundle = Bundle.open(path, check_digests=False)
    engine = backend("ort-cpu", memory="shared")
    before = proportional_bytes()
    if what == "plan":
        plan = bundle.manifest.plan(names[0])
        with Session.open(bundle, engine="ort-cpu", memory="shared", plans=[plan]) as session:
            binding = Binding(session, plan, 1)
            specs = {t.name: t for graph in plan.graphs() for t in bundle.manifest.graphs[graph].inputs}
            rows = {n: np.zeros(resolve(specs[n].shape, 1), np.float32) for n in binding.conditioning()}
            start = np.ones((1, *bundle.manifest.latents), np.float32)
            for _ in run(binding, latents=start, conditioning=rows, guidance_scale=plan.guidance_scale):
                pass
            print(json.dumps({"before": before, "after": proportional_bytes()}))
        return
    graphs = engine.load(bundle, names)
    for name, graph in graphs.items():
        spec = bundle.manifest.graphs[name]
        inputs = {t.name: engine.allocate(resolve(t.shape, 1), t.dtype) for t in spec.inputs}
        outputs = {t.name: engine.allocate(resolve(t.shape, 1), t.dtype) for t in spec.outputs[:1]}
        graph.bind(inputs, outputs)()
    print(json.dumps({"before": before, "after": proportional_bytes()}))


if __name__ == "__main__":
    main()
