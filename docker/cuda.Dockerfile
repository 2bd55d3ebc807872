# dpace on NVIDIA GPUs. From the repository's root:
#   docker build -f docker/cuda.Dockerfile -t dpace:cuda .
#   docker run --rm --user "$(id -u):$(id -g)" --gpus all --ipc host -v "$PWD:/work" -v dpace-cache:/cache dpace:cuda \
#       train recipe.yaml
# Several GPUs: add `--entrypoint torchrun`, and `--nproc-per-node 8 -m dpace.cli train recipe.yaml` as arguments.
FROM python:3.11-slim

# torch from PyPI brings CUDA's libraries with it, so the host needs only a driver. torch.compile calls a C compiler;
# a version of it that is pinned here is gone from the mirrors within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir /source

# Any user may write to these folders, so that `--user` works: such a user has no name and no home here.
ENV HOME=/home/dpace USER=dpace XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
RUN useradd --uid 1000 --create-home dpace && mkdir /cache /work && chmod 1777 /cache /work /home/dpace
USER 1000
WORKDIR /work
ENTRYPOINT ["dpace"]
CMD ["--help"]
