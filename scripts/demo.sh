#!/usr/bin/env bash
# Exports the embedded model, verifies the bundle, draws three pictures with it and times it. Offline.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bundle=bundles/mini
pictures=bundles/pictures
mkdir -p "$pictures"

tgate-export --model mini-sdxl --m 10 --k 5 --output "$bundle" --force
tgate verify "$bundle"

draw() {  # SEED FILE PROMPT
    tgate generate "$bundle" "$3" --seed "$1" --output "$pictures/$2"
}
draw 7 circle-above-square.png "a large red circle above a small blue square"
draw 8 green-triangle.png "a small green triangle"
draw 9 square-left-of-circle.png "a large blue square left of a small yellow circle"

tgate bench "$bundle"
echo "pictures: $pictures"
