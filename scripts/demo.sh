#!/usr/bin/env bash
# Draws with the bundle that ships, exports its model anew, draws with that ungated and gated, and times one against
# the other. Offline.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
prompt="a large red circle above a small blue square"

mkdir -p bundles
tgate generate mini "$prompt" --seed 7 --output bundles/first.png
tgate-export --model mini-pixart --output bundles/mini --force
tgate generate bundles/mini "$prompt" --seed 7 --output bundles/mini.png
python scripts/demo_pictures.py bundles/mini bundles/demo.png
tgate bench bundles/mini
