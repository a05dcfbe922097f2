"""Ten seconds of libFuzzer on everything that reads a stranger's bytes, under AddressSanitizer and UBSan.

The same inputs each time, so that a change that breaks something is told from bad luck. For others, let a target run
with another seed: ``make cpp-fuzz && build/cpp/fuzz/fuzz-graph -max_total_time=3600 FOLDER``.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tgate_engine import models

MINI = Path(models.__path__[0]) / "mini"
SEEDS = {
    "manifest": [MINI / "manifest.json"],
    "weights_header": [MINI / "weights.head"],
    "graph": sorted(MINI.glob("*.onnx")),
    "tokenizer": sorted(MINI.glob("tokenizer/*.json")),
}
LEAST_RUNS = 30
"""In that time, on a machine that does other things too; a run of the manifest's parses, signs and checks 40 KB."""


@pytest.mark.sanitizers
@pytest.mark.parametrize("target", SEEDS)
def test_made_up_bytes(cpp_preset: Callable[[str], Path], tmp_path: Path, target: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for seed in SEEDS[target]:
        (corpus / seed.name).write_bytes(seed.read_bytes())
    limits = ["-seed=1", "-max_total_time=10", "-timeout=10", "-rss_limit_mb=4096", "-print_final_stats=1"]
    program = cpp_preset("fuzz") / f"fuzz-{target}"
    done = subprocess.run(
        [program, *limits, f"-artifact_prefix={tmp_path}/", corpus],
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    runs = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert runs is not None
    assert int(runs[1]) > LEAST_RUNS
