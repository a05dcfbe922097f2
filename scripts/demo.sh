#!/usr/bin/env bash
# Exports an embedded model, draws with it ungated and gated, and times one against the other. Offline.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tgate-export --model mini-pixart --output bundles/mini --force
tgate generate bundles/mini "a large red circle above a small blue square" --seed 7 --output bundles/mini.png
python scripts/demo_pictures.py bundles/mini bundles/demo.png
tgate bench bundles/mini
