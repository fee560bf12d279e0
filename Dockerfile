# The server with its embedded default model.
#
#   docker build -t transformers-api .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#       -p 127.0.0.1:5000:5000 -v models:/models transformers-api
#
# With an NVIDIA GPU: `docker build --build-arg TORCH=cu130 …` and `docker run --gpus all …`. For a
# cluster, deploy/compose and deploy/kubernetes: `--build-arg EXTRA=ray`.
# Whoever reaches the published port may use the server, unless there are API keys; it fetches models
# from the Hub only with `-e ALLOW_DOWNLOAD=true`. For an image that can be built again to the byte,
# name the base by its digest: `--build-arg BASE=python:3.11-slim@sha256:…`.

ARG BASE=python:3.11-slim

FROM ${BASE} AS packages

# The build of torch: one for CPUs, or the one for CUDA 13.
ARG TORCH=cpu
# `ray` for a cluster, ENGINE=ray.
ARG EXTRA=

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_REQUIRE_HASHES=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /build
COPY requirements.lock deploy/torch-cpu.lock deploy/torch-cu130.lock deploy/ray.lock ./

# The files of hashes name every package. The index of PyTorch has the build for CPUs.
RUN python -m venv /venv \
    && /venv/bin/pip install --no-deps --requirement "torch-${TORCH}.lock" \
        --extra-index-url https://download.pytorch.org/whl/cpu \
    && /venv/bin/pip install --no-deps --requirement requirements.lock \
        ${EXTRA:+--requirement "${EXTRA}.lock"}


FROM ${BASE} AS kernels

# The compiler stays behind. Whether a processor has what they need is asked where the image runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY transformers_api transformers_api
RUN install --directory /kernels \
    && NATIVE_CACHE=/kernels python -m transformers_api kernels --any-cpu


FROM ${BASE}

# Converted models and the Hugging Face cache lie under XDG_CACHE_HOME, unless MODEL_STORE and
# HF_HOME say otherwise. Nothing else is written, except in /tmp. Without MALLOC_… the memory that a
# model leaves behind is not given back.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_ARENA_MAX=2 \
    MALLOC_MMAP_THRESHOLD_=131072 \
    XDG_CACHE_HOME=/models \
    NATIVE_CACHE=/kernels \
    HOST=0.0.0.0

COPY --from=packages /venv /venv
COPY --from=kernels /kernels /kernels
WORKDIR /app
COPY app.py wsgi.py gunicorn.conf.py api_client.py ./
COPY transformers_api transformers_api
RUN useradd --uid 1000 --create-home server \
    && install --directory --owner=server --group=server /models \
    && python -m compileall -q .

USER 1000:1000
VOLUME /models
EXPOSE 5000

HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-m", "transformers_api.server.health_check"]

CMD ["python", "-m", "transformers_api", "serve"]
