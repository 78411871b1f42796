# fastmae with all its commands. torch's own wheels bring CUDA, so a plain Python image serves CPUs and GPUs:
#
#   docker build -t fastmae .
#   docker build -t fastmae:cpu --build-arg TORCH_INDEX=URL .   # smaller, without CUDA: URL of torch's CPU builds
#   docker run --rm -v "$PWD":/work --user "$(id -u):$(id -g)" fastmae pretrain --data_path digits
#   docker run --rm --gpus all --ipc host -v "$PWD":/work --user "$(id -u):$(id -g)" fastmae pretrain --data_path photos
#   docker run … --entrypoint torchrun fastmae --nproc_per_node 8 -m fastmae pretrain …
#
# BASE may be any Debian or Ubuntu image with Python 3.11 or newer, such as a site's own with CUDA. EXTRAS are extras of
# pyproject.toml: --build-arg EXTRAS=track,parquet,cuda
ARG BASE=python:3.11-slim

FROM ${BASE} AS base
# A compiler in the last stage too: Triton and torch.compile call one when a run starts.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/fastmae/bin:$PATH

FROM base AS build
RUN python3 -m venv /opt/fastmae
ARG TORCH="torch>=2.11"
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
WORKDIR /build
COPY . .
ARG EXTRAS=""
RUN pip install --no-cache-dir ".${EXTRAS:+[$EXTRAS]}"

FROM base
COPY --from=build /opt/fastmae /opt/fastmae
RUN useradd --create-home fastmae && install --directory --owner fastmae /work
# HOME holds caches of compiled kernels, so every user that --user names must be able to write there.
ENV HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER fastmae
WORKDIR /work
ENTRYPOINT ["fastmae"]
CMD ["--help"]
