#!/usr/bin/env bash
# Half an hour on a lent GPU machine, in four calls of at most ten minutes each: benchmarks/gpu/day.sh 1, then 2, 3, 4.
#
# The machine reaches no network and is empty at first. What is brought lies beside this repository's files: wheels in
# .whl/ (call 1), and benchmarks.gpu.pack's parts in .p0/ (call 1) and .p1/ (call 2). What is measured is kept in $STATE,
# since each call finds $OUT empty, and goes to $OUT whenever a call ends. A call that is cut ends itself first: a
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

bring_back() {
  cp "$RESULTS"/*.json "$OUT"/ 2>/dev/null
  (cd "$STATE" && tar -czf "$OUT/logs.tgz" ./*.log 2>/dev/null)
  date
}
trap bring_back EXIT

# Inductor links against the driver's library, whose name for linking is CUDA's stub, or is made of the driver's own.
link_driver() {
  export LIBRARY_PATH=$CUDA_HOME/lib64/stubs
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

# In a rehearsal, small models and the CPU's engine stand in for SDXL and the GPU's.
sdxl="--models sdxl" cuda=ort-cuda plain=ort-cuda+no-graphs inductor=aoti
if [ "$DEVICE" = cpu ]; then sdxl="--tiny --models mini-sdxl" cuda=ort-cpu plain=ort-cpu+shared inductor=ort-cpu; fi

link_driver
case ${1-} in
1) # Does it compute the right thing: small models first, then SDXL's bundle and its reference.
  wheels=(.whl/*.whl)
  if [ -e "${wheels[0]}" ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" \
      "${wheels[@]}" || exit 1
  fi
  cp .p0/part.* "$STATE"/ 2>/dev/null
  [ "$DEVICE" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv
  nproc --all
  df -h "$STATE" | tail -1
  measure 170 tiny --tiny --models mini-sdxl --engines $inductor --sections check,loops
  measure 390 gpu $sdxl --engines $inductor --sections check ;;
2) # ONNX Runtime: right, captured, fast, its memory.
  cp .p1/part.* "$STATE"/ 2>/dev/null
  if compgen -G "$STATE/part.*" >/dev/null; then cat "$STATE"/part.* | tar -xJ -C "$SITE" || exit 1; fi
  python3 -c "import onnxruntime as o; print(o.__version__, o.__file__, o.get_available_providers())"
  measure 150 tiny --tiny --models mini-sdxl --engines $cuda,$plain --sections check,loops
  measure 400 gpu $sdxl --engines $cuda --sections check,open,loops,memory ;;
3) # AOTInductor, whose graphs are kept one by one as they are compiled.
  measure 580 gpu $sdxl --retry --engines $inductor --sections check,loops,memory ;;
4) # Beside what users would otherwise take; then what a CUDA graph is worth.
  measure 400 gpu $sdxl --engines $cuda,$inductor --sections peers --compile-mode default
  measure 160 gpu $sdxl --engines $plain --sections loops ;;
*)
  echo "usage: $0 1|2|3|4" >&2
  exit 2 ;;
esac
