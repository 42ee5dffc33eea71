# The service's image. `docker build -t llm-fastapi-service:latest .` makes the one for CPUs.
#
# Build arguments:
#   VARIANT=cuda       torch with CUDA, exactly as poetry.lock has it; the default, cpu, has none of it
#   VARIANT=vllm       the one for CPUs, and vLLM with CUDA in an environment of its own; vllm-cpu:
#                      the same layout without CUDA, by which it is tested
#   BUNDLED_MODEL=0    leave out the small model (98 MB) that MODEL__SOURCE=bundled serves
#   TORCH_INDEX_URL    where the CPU build of torch comes from; empty: from pip's own sources
#   PIP_INDEX_URL      where everything else comes from; empty: pip's own
#   PIP_FIND_LINKS     a folder or page with more wheels
#   REVISION           the commit, for the image's labels

# ---- builder: the virtual environment, with the locked dependencies and nothing else in it -------
FROM python:3.11-slim-bookworm AS builder

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1

WORKDIR /build

# pip stays outside of the environment that it fills, because that one goes into the image.
RUN python -m venv /opt/tools \
    && python -m venv --without-pip /opt/venv

ARG VARIANT=cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=

COPY poetry.lock deploy/docker/lock_requirements.py ./
RUN set -eu; \
    install() { /opt/tools/bin/pip --python /opt/venv/bin/python install \
        --no-deps --no-compile --only-binary :all: "$@"; }; \
    case "$VARIANT" in vllm*) locked=cpu;; *) locked="$VARIANT";; esac; \
    python lock_requirements.py --variant "$locked" poetry.lock .; \
    if [ -s torch.txt ]; then install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt; fi; \
    install --require-hashes -r requirements.txt; \
    /opt/tools/bin/pip --python /opt/venv/bin/python check

# Bytecode is compiled here, because the image's file system may be read-only, and then every start
# would compile everything again. torch's inner tests are written for several Pythons at once.
COPY deploy/docker/trim.sh ./
RUN sh trim.sh /opt/venv \
    && /opt/venv/bin/python -c "import torch, transformers, langchain_huggingface" \
    && /opt/venv/bin/python -m compileall -q -j 0 -x torch/testing/_internal \
        --invalidation-mode unchecked-hash /opt/venv/lib

# ---- vllm: its environment, at the path where the service looks for it; empty without it ------------
FROM builder AS vllm

ARG VARIANT=cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=
COPY deploy/vllm/*.txt ./vllm/
RUN set -eu; \
    mkdir -p /vllm/app; \
    case "$VARIANT" in vllm) list=vllm/cuda.txt;; vllm-cpu) list=vllm/cpu.txt;; *) exit 0;; esac; \
    python -m venv --without-pip /app/.tools/vllm; \
    install() { /opt/tools/bin/pip --python /app/.tools/vllm/bin/python install --no-deps --no-compile "$@"; }; \
    torch="$(sed -n 's/^\(torch==[^ ]*+cpu\).*/\1/p' "$list")"; \
    if [ -n "$torch" ]; then install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"; fi; \
    install -r "$list"; \
    /app/.tools/vllm/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash \
        /app/.tools/vllm/lib >/dev/null || true; \
    mv /app/.tools /vllm/app/

# ---- model: the bundled model, here because this stage has pip, which downloads it ----------------
FROM builder AS model

ARG BUNDLED_MODEL=1
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=
COPY app/__init__.py app/
COPY app/llm/__init__.py app/llm/
COPY app/llm/models/__init__.py app/llm/models/bundled.py app/llm/models/
RUN set -eu; \
    mkdir -p /models; \
    if [ "$BUNDLED_MODEL" = 1 ]; then \
        HF_HOME=/models /opt/tools/bin/python -c "from app.llm.models.bundled import fetch; print(fetch())"; \
    fi; \
    chmod -R g=u /models

# ---- application: the sources with their bytecode -------------------------------------------------
FROM builder AS application

COPY app /app/app
COPY config.yml LICENSE /app/
RUN chmod -R u=rwX,go=rX /app \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /app/app

# ---- runtime: what is shipped ----------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS runtime

# The base image's own pip is not needed, and the service's user owns nothing but the model cache.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3.11/ensurepip /usr/local/lib/python3.11/site-packages/* \
    && groupadd --gid 10001 llm \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin llm

# Where vLLM runs on a GPU, it compiles kernels at its start; for CPUs it needs libnuma.
ARG VARIANT=cpu
RUN set -eu; \
    case "$VARIANT" in vllm) packages=g++;; vllm-cpu) packages=libnuma1;; *) exit 0;; esac; \
    apt-get update; \
    apt-get install -y --no-install-recommends "$packages"; \
    rm -rf /var/lib/apt/lists/*

COPY --from=builder /opt/venv /opt/venv
COPY --from=vllm /vllm/ /
# Group 0, because OpenShift runs the image as a user of any number in that group.
COPY --from=model --chown=10001:0 /models /models
COPY --from=application /app /app

# The command of pyproject.toml, as the project is not installed here.
RUN printf '#!/bin/sh\ncd /app && exec python -m app "$@"\n' > /usr/local/bin/llm-service \
    && chmod 755 /usr/local/bin/llm-service

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models \
    HF_HUB_DISABLE_TELEMETRY=1 \
    APP__ENVIRONMENT=production

WORKDIR /app
USER 10001:10001
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM

HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-ISc", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/livez'); raise SystemExit(c.getresponse().status != 200)"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="LLM FastAPI Service" \
      org.opencontainers.image.description="One process, one Hugging Face language model, behind a production-ready HTTP API." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"

# Host and port are fixed, whatever a mounted config.yml says: inside a container the one has to be
# every interface, and the other is chosen from outside, with -p.
CMD ["uvicorn", "app.main:app", "--host", "0.0.0.0", "--port", "8000"]
