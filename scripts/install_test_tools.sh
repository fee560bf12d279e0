#!/usr/bin/env bash
# The programs that some tests use beside Python, from Debian: nginx, redis, systemd-analyze,
# openssl, shellcheck, a Chromium without a window; with the argument `image` what builds and runs the
# image (`make image-test`), with `arm` what tests the kernels for ARM: an emulator and a compiler, and
# NEON's functions for x86.
# Needs root or sudo, and starts no service. Does nothing where all are there.
set -euo pipefail

declare -A packages=(
    [nginx]=nginx-light
    [redis-server]=redis-server
    [systemd-analyze]=systemd
    [shellcheck]=shellcheck
    [openssl]=openssl
    [chromium-headless-shell]=chromium-headless-shell
)
if [[ ${1:-} == image ]]; then
    packages=(
        [debootstrap]=debootstrap
        [podman]=podman
        [runc]=runc
        [docker-compose]=docker-compose
        [netavark]=netavark
        [aardvark-dns]=aardvark-dns
    )
fi

if [[ ${1:-} == arm ]]; then
    packages=(
        [qemu-aarch64]=qemu-user
        [aarch64-linux-gnu-g++]=g++-aarch64-linux-gnu
        [/usr/include/simde/arm/neon.h]=libsimde-dev
    )
fi

PATH=$PATH:/usr/sbin:/sbin:/usr/lib/podman
missing=()
for program in "${!packages[@]}"; do
    command -v "$program" >/dev/null || [[ -e $program ]] || missing+=("${packages[$program]}")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

root=()
if [[ $EUID -ne 0 ]]; then
    if ! sudo --non-interactive true 2>/dev/null; then
        echo "Not installed, as this needs root: ${missing[*]}" >&2
        exit 1
    fi
    root=(sudo)
fi
if ! command -v apt-get >/dev/null; then
    echo "Not installed, as there is no apt-get: ${missing[*]}" >&2
    exit 1
fi

# Debian starts what it installs, unless this file says no.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap '"${root[@]}" rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' | "${root[@]}" tee "$policy" >/dev/null
    "${root[@]}" chmod +x "$policy"
fi
"${root[@]}" apt-get update --quiet --quiet
"${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --quiet --quiet --no-install-recommends "${missing[@]}" >/dev/null
