#!/usr/bin/env bash
# Half an hour on a lent GPU machine, in four calls of at most ten minutes each: benchmarks/gpu/day.sh 1, then 2, 3, 4.
#
# The machine reaches no network and is empty at first. What is brought lies beside this repository's files: wheels in
# .whl/ (call 1), benchmarks.gpu.pack's parts in .p1/ (call 1) and .p0/ (call 2), benchmarks.gpu.bring's thin bundle and
# its reference in .bundles/ (call 1), libtgate.so and libonnxruntime.so in .cpp/ (call 1). What is measured is kept in
# $STATE, since each call finds $OUT empty, and goes to $OUT whenever a call ends. A call that is cut ends itself first: a
# command that is killed from outside runs no trap.
set -u
STATE=${STATE:-/tmp/tgate-gpu-day}
SITE=$STATE/site
RESULTS=$STATE/results
OUT=${OUT:-$STATE}
DEVICE=${DEVICE:-cuda}         # cpu: a rehearsal, of small models
mkdir -p "$SITE" "$RESULTS"
export PYTHONUNBUFFERED=1 PYTHONPATH=$SITE
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export TGATE_CACHE=$STATE/engines

bring_back() {
  cp "$RESULTS"/*.json "$STATE"/*.reference.npz "$OUT"/ 2>/dev/null
  (cd "$STATE" && tar -czf "$OUT/logs.tgz" ./*.log 2>/dev/null)
  date
}
trap bring_back EXIT

# Inductor links against the driver's library, whose name for linking is CUDA's stub, or is made of the driver's own; and
# against a C++ library, which has to be the shared one.
link_libraries() {
  export LIBRARY_PATH=$CUDA_HOME/lib64/stubs
  echo "libstdc++.so is $(g++ -print-file-name=libstdc++.so), the static one $(g++ -print-file-name=libstdc++.a)"
  local driver
  driver=$(ldconfig -p | awk '/libcuda.so.1/ { print $NF; exit }')
  if [ -e "$LIBRARY_PATH/libcuda.so" ] || [ -z "$driver" ]; then return; fi
  mkdir -p "$STATE/driver"
  ln -sf "$driver" "$STATE/driver/libcuda.so"
  export LIBRARY_PATH=$STATE/driver
}

# measure SECONDS FILE ARGUMENTS...: one run, ended before its time is up.
measure() {
  local seconds=$1 file=$2
  shift 2
  timeout "$seconds" python3 -m benchmarks.gpu.run --device "$DEVICE" --bundles "$STATE" --resume \
    --budget-s $((seconds - 15)) --output "$RESULTS/$file.json" "$@"
}

with_repository() { PYTHONPATH=.:export:runtime:cli:$SITE "$@"; }

# compile GRAPH: one of SDXL's graphs for aoti, into the cache that calls 3 and 4 find filled.
compile() {
  with_repository timeout 540 python3 - "$STATE/sdxl" "$1" >"$STATE/compile-$1.log" 2>&1 <<'END'
import sys, time
from pathlib import Path
from benchmarks.gpu.setting import engine_of
from tgate_engine.bundle import Bundle
opened, begin = Bundle.open(Path(sys.argv[1]), check_digests=False), time.monotonic()
print(engine_of("aoti", "cuda").build(opened, [opened.manifest.shapes[0].graphs[sys.argv[2]]]))
print(f"{time.monotonic() - begin:.0f} s")
END
}

# In a rehearsal, small models and the CPU's engine stand in for SDXL and the GPU's.
sdxl="--models sdxl" cuda=ort-cuda plain=ort-cuda+no-graphs inductor=aoti
if [ "$DEVICE" = cpu ]; then sdxl="--tiny --models mini-sdxl" cuda=ort-cpu plain=ort-cpu+shared inductor=ort-cpu; fi

link_libraries
case ${1-} in
1) # SDXL's weights made; aoti's own tests, and SDXL's graphs compiled for it meanwhile.
  wheels=(.whl/*.whl)
  if [ -e "${wheels[0]}" ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" \
      "${wheels[@]}" || exit 1
  fi
  cp .p1/part.* .bundles/*.npz .cpp/*.so* "$STATE"/ 2>/dev/null
  [ "$DEVICE" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv
  nproc --all
  df -h "$STATE" | tail -1
  if [ -d .bundles/sdxl ]; then with_repository python3 -m benchmarks.gpu.bring whole .bundles/sdxl "$STATE/sdxl"; fi
  if [ "$DEVICE" = cuda ]; then
    for graph in full reuse_self reuse_cross unguided; do compile $graph & done
    TGATE_CACHE=$STATE/tests with_repository timeout 500 python3 -m pytest -q -x --noconftest -p no:cacheprovider \
      tests/runtime/engines/test_aoti_cuda.py >"$STATE/aoti-tests.log" 2>&1
    grep -v '^  File' "$STATE/aoti-tests.log" | cut -c1-300 | head -30
    wait
    tail -n 2 "$STATE"/compile-*.log
  fi ;;
2) # ONNX Runtime: right, captured, fast, its memory, where its time goes; libtgate beside it.
  cp .p0/part.* "$STATE"/ 2>/dev/null
  if compgen -G "$STATE/part.*" >/dev/null; then cat "$STATE"/part.* | tar -xJ -C "$SITE" || exit 1; fi
  python3 -c "import onnxruntime as o; print(o.__version__, o.__file__, o.get_available_providers())"
  measure 80 tiny --tiny --models mini-sdxl --engines $cuda,$plain --sections check,loops
  measure 330 gpu $sdxl --engines $cuda --sections check,loops,open,memory,kernels
  if [ -e "$STATE/libtgate.so" ]; then
    with_repository timeout 120 python3 -m benchmarks.gpu.libtgate "$STATE/sdxl" --library "$STATE/libtgate.so" \
      --onnxruntime "$(ls "$STATE"/libonnxruntime.so.*)" --output "$RESULTS/libtgate.json"
  fi ;;
3) # AOTInductor, compiled in call 1.
  measure 100 tiny --tiny --models mini-sdxl --engines $inductor --sections check,loops
  measure 400 gpu $sdxl --retry --engines $inductor --sections check,loops,kernels,memory ;;
4) # Beside what users would otherwise take; then what a CUDA graph is worth.
  measure 300 gpu $sdxl --engines $cuda,$inductor --sections peers --compile-mode default
  measure 160 gpu $sdxl --engines $plain --sections loops ;;
*)
  echo "usage: $0 1|2|3|4" >&2
  exit 2 ;;
esac
