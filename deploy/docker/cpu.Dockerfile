# The CPU image: everything for the demos and for clusters without GPUs.
#   docker build -f deploy/docker/cpu.Dockerfile -t align:cpu .
#   docker run --rm --shm-size 2g align:cpu align --version
# --build-arg BASE=... takes the same base from a mirror of yours.
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

# vLLM's CPU build compiles small kernels at the first start and links libnuma; KubeRay's probes call wget (and bash and grep).
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget g++ libnuma1 libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 align \
 && install -d -o align /app /shared

WORKDIR /app
COPY deploy/requirements/cpu.txt requirements.txt
RUN pip install --no-cache-dir uv==0.13.9 \
 && uv pip install --system --no-cache --no-deps --compile-bytecode --torch-backend cpu -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY align align
COPY cluster cluster
COPY deploy/runs deploy/runs
RUN uv pip install --system --no-cache --no-deps .

# By number, so that Kubernetes can check runAsNonRoot.
USER 1000
ENV HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 WANDB_ERROR_REPORTING=false
CMD ["align", "--help"]
