# Targets: gateway (no torch, no weights), worker-cpu, worker-gpu. docs/operations.md has the commands.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS base
ENV PATH=/opt/offramp/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN groupadd --gid 10001 offramp \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin offramp

# pip's own environment variables: where packages come from, for instance a CPU build of torch.
# They reach these build stages alone; only /opt/offramp is copied out of them.
FROM base AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/offramp
COPY constraints.txt ./

FROM build AS build-gateway
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
COPY models/__init__.py models/api.py models/registry.py ./models/
RUN pip install --constraint constraints.txt .

FROM build AS build-worker
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
COPY models ./models

FROM build-worker AS build-worker-cpu
RUN pip install --constraint constraints.txt ".[cpu,latent]"

FROM build-worker AS build-worker-gpu
RUN pip install --constraint constraints.txt ".[gpu,latent]"

FROM base AS gateway
COPY --from=build-gateway /opt/offramp /opt/offramp
ENV OFFRAMP_HOST=0.0.0.0 OFFRAMP_PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['OFFRAMP_PORT']}/healthz\", timeout=2)"]
ENTRYPOINT ["offramp"]
CMD ["gateway"]

FROM base AS worker
ENV OFFRAMP_WORKER_HOST=0.0.0.0 OFFRAMP_WORKER_METRICS_PORT=9100 OFFRAMP_CACHE_DIR=/cache
RUN install --directory --owner=10001 --group=10001 /cache
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['OFFRAMP_WORKER_METRICS_PORT']}/metrics\", timeout=2)"]
ENTRYPOINT ["offramp"]
CMD ["worker"]

FROM worker AS worker-cpu
COPY --from=build-worker-cpu /opt/offramp /opt/offramp

FROM worker AS worker-gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-worker-gpu /opt/offramp /opt/offramp
