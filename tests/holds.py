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
from tgate_engine.footprint import buffers
from tgate_runtime import Session, State, run
from tgate_runtime.engines import open_engine


def main() -> None:
    path, what, *names = sys.argv[1:]
    bundle = Bundle.open(path, check_digests=False)
    shape, engine = bundle.manifest.shapes[0], open_engine("ort-cpu", memory="shared")
    before = proportional_bytes()
    if what == "plan":
        plan = bundle.manifest.plan(names[0])
        with Session.open(bundle, engine=engine, plans=[plan]) as session:
            state, tensors = State(session, plan, 1), buffers(shape.graphs, [plan])
            conditioning = {n: np.zeros(tensors[n].resolve(1), np.float32) for n in state.conditioning()}
            start = np.ones((1, *shape.latents), np.float32)
            for _ in run(state, latents=start, conditioning=conditioning, guidance_scale=plan.guidance_scale):
                pass
            print(json.dumps({"before": before, "after": proportional_bytes()}))
        return
    specs = [shape.graphs[name] for name in names]
    graphs = engine.load(bundle, specs)
    for spec in specs:
        inputs = {t.name: engine.allocate(t.resolve(1), t.dtype) for t in spec.inputs}
        outputs = {t.name: engine.allocate(t.resolve(1), t.dtype) for t in spec.outputs[:1]}
        graphs[spec.file].bind(inputs, outputs)()
    print(json.dumps({"before": before, "after": proportional_bytes()}))


if __name__ == "__main__":
    main()
