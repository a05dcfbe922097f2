#!/usr/bin/env bash
# What libtgate is built with: a compiler, CMake, nlohmann-json, OpenSSL's headers, libpng for tgate-run, and the header
# of ONNX Runtime's C API, which goes to the directory that is named. `--fuzz` brings clang with its libFuzzer as well.
#
# On Debian and Ubuntu, missing packages are installed where this may be done (root, or sudo without a password);
# elsewhere a line says which are missing. The header comes out of Debian's libonnxruntime-dev: 1.21, API 21, whichever
# library is loaded later.
set -euo pipefail

usage="usage: $0 [--fuzz] DIRECTORY"
fuzz=
if [ "${1-}" = --fuzz ]; then fuzz=1; shift; fi
target=${1:?$usage}

packages=()
needs() { packages+=("$1"); }
command -v c++ >/dev/null || needs g++
command -v cmake >/dev/null || needs cmake
command -v ninja >/dev/null || needs ninja-build
command -v pkg-config >/dev/null || needs pkg-config
has_header() { echo "#include <$1>" | c++ -E -x c++ - >/dev/null 2>&1; }
has_header nlohmann/json.hpp || needs nlohmann-json3-dev
has_header openssl/evp.h || needs libssl-dev
has_header png.h || needs libpng-dev
if [ -n "$fuzz" ]; then
  command -v clang++ >/dev/null || needs clang
  echo 'extern "C" int LLVMFuzzerTestOneInput(const char *, unsigned long) { return 0; }' |
    clang++ -fsanitize=fuzzer -x c++ - -o /dev/null 2>/dev/null || needs libclang-rt-dev
fi

sudo=
if [ "$(id -u)" != 0 ]; then sudo="sudo -n"; fi
if [ ${#packages[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null || ! $sudo true 2>/dev/null; then
    echo "$0: missing: ${packages[*]} (Debian's names); install them" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  $sudo apt-get update -qq
  # Some releases have the runtime of clang under the version's name alone.
  if [[ " ${packages[*]} " == *" libclang-rt-dev "* ]] && ! apt-cache show libclang-rt-dev >/dev/null 2>&1; then
    version=$(apt-cache depends clang | sed -n 's/.*Depends: clang-\([0-9]*\)$/\1/p' | head -1)
    packages=("${packages[@]/#libclang-rt-dev/libclang-rt-$version-dev}")
  fi
  $sudo apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

header=$target/onnxruntime_c_api.h
if [ -f "$header" ]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! command -v apt-get >/dev/null; then
  echo "$0: $header is not there; put the one of ONNX Runtime 1.21 or later there" >&2
  exit 1
fi
# A private directory for apt, with this machine's own sources but of the release that has the header.
mkdir -p "$work"/etc/{sources,preferences.d} "$work"/state/lists/partial "$work"/cache/archives/partial
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-none}")
sources=(/etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list)
for file in "${sources[@]}"; do
  [ -f "$file" ] || continue
  sed -e "s/$codename-updates//; s/\b$codename\b/trixie/g" "$file" >"$work/etc/sources/$(basename "$file")"
done
private=(-o Dir::Etc="$work/etc" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/etc/sources"
  -o Dir::State="$work/state" -o Dir::Cache="$work/cache" -o Dir::State::status=/dev/null
  -o Dir::Etc::Trusted=/etc/apt/trusted.gpg -o Dir::Etc::TrustedParts=/etc/apt/trusted.gpg.d -o APT::Sandbox::User=root)
apt-get "${private[@]}" update -qq
(cd "$work" && apt-get "${private[@]}" download -qq libonnxruntime-dev)
dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/x"
mkdir -p "$target"
cp "$work/x/usr/include/onnxruntime/onnxruntime_c_api.h" "$target/.new.$$"
mv "$target/.new.$$" "$header"
