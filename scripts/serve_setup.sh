#!/usr/bin/env bash
# What the server's tests need of the system: curl and jq, which the documentation's commands use, and a browser that
# looks at the page. Prints the path of a Chromium or Chrome that is on PATH.
#
# On Debian, what is missing is installed if that may be done (root, or sudo without a password); elsewhere a line says
# what it is.
set -euo pipefail

find_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

missing=
for program in curl jq; do command -v $program >/dev/null || missing="$missing $program"; done
find_browser >/dev/null || missing="$missing chromium"
if [ -n "$missing" ]; then
  sudo=
  if [ "$(id -u)" != 0 ]; then sudo="sudo -n"; fi
  if ! command -v apt-get >/dev/null || ! $sudo true 2>/dev/null; then
    echo "$0: missing (Debian's names):$missing; install them" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  $sudo apt-get update -qq >&2
  # shellcheck disable=SC2086  # several words
  $sudo apt-get install --yes -qq --no-install-recommends $missing >&2
fi
if ! find_browser; then
  echo "$0: chromium was installed, and is not on PATH" >&2
  exit 1
fi
