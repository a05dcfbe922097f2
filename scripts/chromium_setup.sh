#!/usr/bin/env bash
# The browser that the server's page is looked at with: prints the path of a Chromium or Chrome that is on PATH.
#
# On Debian, where there is none, Chromium is installed if that may be done (root, or sudo without a password);
# elsewhere a line says what is missing.
set -euo pipefail

find_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

if find_browser; then exit 0; fi
sudo=
if [ "$(id -u)" != 0 ]; then sudo="sudo -n"; fi
if ! command -v apt-get >/dev/null || ! $sudo true 2>/dev/null; then
  echo "$0: missing: chromium (Debian's name), or google-chrome; install one" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq >&2
$sudo apt-get install --yes -qq --no-install-recommends chromium >&2
if ! find_browser; then
  echo "$0: chromium was installed, and is not on PATH" >&2
  exit 1
fi
