# One image for router and workers; compose.yaml says which one a container is. Built in one stage, with a compiler, and run
# in another, without. BASE may be any image with Python 3.11 to 3.13; name it with its digest to pin it to the byte.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /app
# Without g++ everything works too: torch then does what is compiled otherwise.
RUN apt-get update && apt-get install -y --no-install-recommends g++ || echo "no compiler here: torch will do what is compiled otherwise"
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_CONSTRAINT=/app/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# What is installed changes seldom, what is copied below often. PIP_EXTRA_INDEX_URL may name PyTorch's own index of CPU wheels: the
# image is then several GB smaller.
ARG PIP_EXTRA_INDEX_URL=
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >/tmp/wanted \
 && pip install --requirement /tmp/wanted \
 && cd /opt/venv/lib/python3*/site-packages \
 && find . -name '*.a' -delete \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && rm -rf torch/test torch/include libucx/bin libucx/include

COPY README.md LICENSE ./
COPY splitfire splitfire
COPY kvtransfer kvtransfer
COPY prefill_svc prefill_svc
COPY decode_svc decode_svc
COPY router router
# Compiled to bytecode here, because a container's root is read-only.
RUN pip install --no-deps --editable . && pip uninstall --yes pip && rm -rf build \
 && python -m compileall -q splitfire kvtransfer prefill_svc decode_svc router

FROM ${BASE}
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/hub TRITON_CACHE_DIR=/kernels
# /credentials, /hub, /kernels and /targets are where compose.yaml mounts volumes; a new volume has the owner of what it covers.
RUN useradd --uid 10001 --no-create-home splitfire \
 && mkdir /credentials /hub /kernels /targets && chown splitfire /credentials /hub /kernels /targets
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
COPY models/pico models/pico
COPY models/pico-draft models/pico-draft
# Triton compiles small pieces of C for a GPU when a worker starts.
ARG DEVICE=cpu
RUN if [ "$DEVICE" = gpu ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
COPY deploy/image deploy

USER 10001
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s CMD ["python", "-I", "-S", "/app/deploy/health.py"]
ENTRYPOINT ["splitfire"]
