#!/usr/bin/env bash
# Write the files of hashes that deploy/install.sh and the Dockerfile install from: `make lock`.
#
# uv is asked for with UV=…; an index other than pypi.org with UV_DEFAULT_INDEX=….
set -euo pipefail
cd "$(dirname "$0")/.."

readonly pytorch=https://download.pytorch.org/whl/cpu
torch=$(grep '^torch==' requirements.txt)

compile() {
    "${UV:-uv}" pip compile --no-config --quiet --generate-hashes --python-version 3.11 \
        --no-header --no-annotate "$@"
}

# requirements.txt names everything, so that nothing is resolved here.
compile --no-deps --no-emit-package torch requirements.txt requirements-models.txt \
    --output-file requirements.lock

# What ENGINE=ray needs besides.
compile --no-deps requirements-ray.txt --output-file deploy/ray.lock

# The build for CUDA is the one of the package index; NVIDIA's packages come with it.
compile --python-platform x86_64-manylinux_2_28 --constraint requirements.txt - \
    --output-file deploy/torch-cu130.lock <<<"$torch"

# The build for CPUs is on PyTorch's own index. Its name is left out: pip chooses by the hash.
if found=$(compile --no-deps --default-index "$pytorch" - <<<"$torch+cpu"); then
    printf '%s\n' "${found//+cpu/}" >deploy/torch-cpu.lock
elif grep --quiet --fixed-strings "$torch " deploy/torch-cpu.lock; then
    echo "$pytorch cannot be reached: deploy/torch-cpu.lock stays as it is, for $torch" >&2
else
    echo "$pytorch cannot be reached: deploy/torch-cpu.lock is not for $torch" >&2
    exit 1
fi
