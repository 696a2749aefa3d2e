# The CUDA image: rollout engines, reference and learner on NVIDIA GPUs.
#   docker build -f deploy/docker/cuda.Dockerfile -t align:cuda .
#   docker run --rm --gpus all --shm-size 16g align:cuda align --version
# torch and vLLM bring the CUDA libraries as wheels; the host needs the driver (580 or newer for CUDA 13) and no toolkit.
# --build-arg BASE=... takes the same base from a mirror of yours.
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

# g++ for the kernels that triton compiles at run time; the InfiniBand libraries for NCCL over the network; KubeRay's probes
# call wget (and bash and grep).
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget g++ libnuma1 libibverbs1 librdmacm1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 align \
 && install -d -o align /app /shared

WORKDIR /app
COPY deploy/requirements/cuda.txt requirements.txt
RUN pip install --no-cache-dir uv==0.13.9 \
 && uv pip install --system --no-cache --no-deps --compile-bytecode -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY align align
COPY cluster cluster
COPY deploy/runs deploy/runs
RUN uv pip install --system --no-cache --no-deps .

# By number, so that Kubernetes can check runAsNonRoot.
USER 1000
# What the host's driver is asked to lend to the container.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 WANDB_ERROR_REPORTING=false
CMD ["align", "--help"]
