# What each argument is for, and the image for GPUs: docs/containers.md
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/sparse-fcmae
ARG PIP_EXTRA_INDEX_URL=
ARG CONSTRAINTS="-c constraints.txt"
COPY constraints.txt requirements.txt ./
RUN pip install --no-cache-dir ${CONSTRAINTS} -r requirements.txt
COPY . .
ARG VERSION=
RUN SETUPTOOLS_SCM_PRETEND_VERSION=${VERSION} pip install --no-cache-dir ${CONSTRAINTS} . \
    && python -I -c "from sparse_ops import registry; raise SystemExit(registry()['cpu'].unavailable_reason())"
ARG MINKOWSKI=skip
RUN test "${MINKOWSKI}" = skip || fcmae minkowski ${MINKOWSKI}

FROM ${BASE} AS runtime
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /opt/sparse-fcmae --no-create-home fcmae \
    && mkdir --mode 1777 /opt/sparse-fcmae
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/opt/sparse-fcmae
WORKDIR /opt/sparse-fcmae
CMD ["fcmae", "backends"]

FROM runtime AS cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001

FROM runtime AS cpu
USER 10001
