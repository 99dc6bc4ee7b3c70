# syntax=docker/dockerfile:1
# Two images of the same runtime:
#   docker build --target cpu -t kserve-vllm:0.1.0-cpu .
#   docker build --target gpu -t kserve-vllm:0.1.0-gpu .
# Both run as uid 1000 with a read-only root file system; only /tmp is written.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# ---- cpu: the build of everything ------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS cpu-build
WORKDIR /src
COPY runtime/requirements/torch-cpu.txt runtime/requirements/lock-runtime.txt ./runtime/requirements/
RUN python -m venv /opt/kserve-vllm \
 && /opt/kserve-vllm/bin/pip install --no-cache-dir --no-deps --require-hashes \
      --extra-index-url https://download.pytorch.org/whl/cpu -r runtime/requirements/torch-cpu.txt \
 && /opt/kserve-vllm/bin/pip install --no-cache-dir --no-deps --require-hashes -r runtime/requirements/lock-runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY runtime/kserve_vllm ./runtime/kserve_vllm
RUN /opt/kserve-vllm/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
 && /opt/kserve-vllm/bin/kserve-vllm --version

# ---- cpu -------------------------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS cpu
# libnuma: vLLM's CPU kernels; g++: torch.compile writes C++; tcmalloc: what vLLM advises on CPUs.
RUN apt-get update \
 && apt-get install -y --no-install-recommends libnuma1 g++ libtcmalloc-minimal4 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=cpu-build /opt/kserve-vllm /opt/kserve-vllm
ENV PATH=/opt/kserve-vllm/bin:$PATH \
    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4 \
    HOME=/tmp \
    USER=kserve-vllm \
    XDG_CACHE_HOME=/tmp/.cache \
    XDG_CONFIG_HOME=/tmp/.config \
    HF_HOME=/tmp/huggingface \
    VLLM_CACHE_ROOT=/tmp/vllm \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 1000:0
# What is compiled at run time: a base without its compiler or headers fails here, and not in a pod.
RUN python -m kserve_vllm.engine.compilers cpu && rm -rf /tmp/* /tmp/.cache /tmp/.config
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["kserve-vllm", "health", "--ready"]
ENTRYPOINT ["kserve-vllm", "serve"]

# ---- gpu -------------------------------------------------------------------------------------------------------------
FROM ${VLLM_IMAGE} AS gpu
WORKDIR /src
COPY runtime/requirements/lock-gpu.txt ./runtime/requirements/
# An environment of its own over vLLM's: what KServe adds or holds back, nothing else of the image moves.
RUN python3 -m venv --system-site-packages /opt/kserve-vllm \
 && /opt/kserve-vllm/bin/python -m pip install --no-cache-dir --no-deps --require-hashes \
      -r runtime/requirements/lock-gpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY runtime/kserve_vllm ./runtime/kserve_vllm
RUN /opt/kserve-vllm/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation . \
 && /opt/kserve-vllm/bin/kserve-vllm --version
ENV PATH=/opt/kserve-vllm/bin:$PATH \
    HOME=/tmp \
    USER=kserve-vllm \
    XDG_CACHE_HOME=/tmp/.cache \
    XDG_CONFIG_HOME=/tmp/.config \
    HF_HOME=/tmp/huggingface \
    VLLM_CACHE_ROOT=/tmp/vllm \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 1000:0
# What is compiled at run time: a base without its compiler or headers fails here, and not in a pod.
RUN python -m kserve_vllm.engine.compilers gpu && rm -rf /tmp/* /tmp/.cache /tmp/.config
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["kserve-vllm", "health", "--ready"]
ENTRYPOINT ["kserve-vllm", "serve"]
