# The job as an image: `pipeline` on Debian, with every package at its locked version and hash.
# Three stages, so that a change of the code alone reuses the layer with the packages: dependencies, package, and what is shipped.

ARG DEBIAN=debian:bookworm-slim


FROM ${DEBIAN} AS dependencies
# No versions here and below: Debian drops old ones from its mirrors, so a pin would break the build one day.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tools \
 && /opt/tools/bin/pip install --no-cache-dir --disable-pip-version-check uv==0.13.9 hatchling==1.33.0
ENV PATH=/opt/tools/bin:$PATH \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/venv
WORKDIR /build
COPY requirements.lock ./

# Empty: PyTorch as locked, which brings about 4 GB of CUDA libraries. "cpu": PyTorch's build for processors alone. It is made elsewhere and has
# other hashes than the lock knows, so this one package is checked by its version and by TLS only; all others are checked by hash either way.
# Bytecode is compiled here, since who runs the job can't write to /opt/venv.
ARG TORCH_BACKEND=
RUN uv venv --python /usr/bin/python3 /opt/venv \
 && case "$TORCH_BACKEND" in \
      "") uv pip install --compile-bytecode --no-deps --require-hashes -r requirements.lock ;; \
      cpu) awk '/^[a-z]/ { skip = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/ } !skip' requirements.lock >cpu.lock \
        && torch=$(awk '/^torch==/ { print $1 }' requirements.lock) \
        && uv pip install --compile-bytecode --no-deps --require-hashes -r cpu.lock \
        && uv pip install --compile-bytecode --no-deps --torch-backend=cpu "$torch" ;; \
      *) echo "TORCH_BACKEND is empty or cpu, not '$TORCH_BACKEND'" >&2; exit 1 ;; \
    esac


FROM dependencies AS package
COPY pyproject.toml README.md LICENSE ./
COPY pipeline ./pipeline
RUN hatchling build -t wheel -d dist \
 && uv pip install --offline --compile-bytecode --no-deps --python /opt/venv/bin/python --prefix /opt/package dist/*.whl


FROM ${DEBIAN}
# git: only the default branch allocates versions, and the job asks git which one it is on; libgomp1 and libstdc++6: llama.cpp
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates git libgomp1 libstdc++6 python3 \
 && rm -rf /var/lib/apt/lists/* \
 && install -d -m 1777 /downloads
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /opt/package /opt/venv

# Any uid may run it: the home is one that all can write to, and LOGNAME answers for a uid that has no name here.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    LOGNAME=pipeline \
    HF_HOME=/downloads \
    DO_NOT_TRACK=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /job
ENTRYPOINT ["pipeline"]
CMD ["run"]

ARG SOURCE=
LABEL org.opencontainers.image.title="pipeline" \
      org.opencontainers.image.description="Fine-tunes a small language model on expert-rated records, compares it honestly with its base, and versions and documents the result." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}"
