# One image for training and probing: docker build -t attnres . && docker run --gpus all attnres +experiment=attnres_0p6b
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc git \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH=torch==2.13.0
WORKDIR /opt/attnres
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY attnres attnres

# The same lines as the Makefile's; a test runs them in a fresh environment.
RUN python3 -m venv .venv
RUN .venv/bin/python -m pip install $TORCH
RUN .venv/bin/python -m pip install --no-deps --require-hashes -r requirements.lock
RUN .venv/bin/python -m pip install --no-deps --no-build-isolation -e .

COPY . .
RUN useradd --create-home researcher && mkdir -p runs cache && chown researcher runs cache
USER researcher
VOLUME ["/opt/attnres/runs", "/opt/attnres/cache"]
ENTRYPOINT [".venv/bin/python", "train.py"]
