"""What libtgate's ``ort-cuda`` asks of the GPU, in a process without Python's onnxruntime, whose library is another
copy:

    python -m tests.cuda_stub.hosted LIBTGATE ONNXRUNTIME BUNDLE PLAN

over the stub. Draws with CUDA graphs, begins once more, makes room for a second request, loads what adapters
change, and prints what each asked as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.cpp.library import Bundle, Library, Pool, Request, Session
from tests.cuda_stub.log import Event, Kind, of, recorded


def told(events: list[Event]) -> dict[str, Any]:
    """Events, as JSON has them: in which order which kinds came, what was captured, and how much was moved."""
    captures: list[Counter[str]] = []
    for event in events:
        if event.kind == Kind.CAPTURE:
            captures.append(Counter())
        elif event.captured and event.kind == Kind.LAUNCH:
            captures[-1][event.name] += 1
    return {
        "kinds": [event.kind.name for event in events],
        "captures": [dict(names) for names in captures],
        "replays": [event.size_bytes for event in of(events, Kind.REPLAY)],
        "uploaded_bytes": sum(event.size_bytes for event in of(events, Kind.COPY) if event.across),
        "uploads": sorted(event.size_bytes for event in of(events, Kind.COPY) if event.across),
        "allocated": [[event.address, event.size_bytes] for event in of(events, Kind.ALLOCATE)],
        "names": sorted({event.name for event in of(events, Kind.LAUNCH)}),
    }


def main() -> None:
    library, onnxruntime, path, plan = sys.argv[1:]
    bundle = Bundle(Library(Path(library)), Path(path))
    with recorded() as loading:
        session = Session(bundle, plans=[plan], library=Path(onnxruntime), engine=b"ort-cuda", cuda_graphs=1)
    advice = session.advice()
    given = {name: np.ones(shape, np.float32) for name, shape in bundle.tensors().items()}
    with recorded() as binding:
        request = Request(session, plan=plan, tensors=given, seed=1)
    request.run()
    request.reset(plan=plan, tensors=given, seed=2)
    request.step()
    with recorded() as stepping:
        request.step()
    with ThreadPoolExecutor(1) as another:
        elsewhere = str(another.submit(request.step).exception())
    with recorded() as again:
        pool = Pool(session, 1, plans=[plan])
    buffers_bytes = pool.bytes
    with recorded() as adapting:
        adapted = session.adapted(dict.fromkeys(bundle.names("adapter"), 1.0))
    adapted.close()
    with recorded() as releasing:
        pool.close()
        request.close()
        session.close()
    assert "onnxruntime" not in sys.modules
    found = {"loading": loading, "binding": binding, "stepping": stepping, "again": again, "adapting": adapting}
    found["releasing"] = releasing
    print(
        json.dumps(
            {
                "elsewhere": elsewhere,
                "advice": advice,
                "buffers_bytes": buffers_bytes,
                **{name: told(events) for name, events in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
