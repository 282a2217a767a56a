# docker build -t alignlab . && docker run --rm --gpus all -v "$PWD/runs:/workspace/runs" alignlab demo
# The torch wheel carries the CUDA libraries; the host brings the driver and the NVIDIA container toolkit.
FROM python:3.11-slim-bookworm
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# triton compiles its launchers with the machine's C compiler
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /alignlab
RUN pip install -c /alignlab/constraints.txt "/alignlab[tracking]"
WORKDIR /workspace
ENTRYPOINT ["alignlab"]
CMD ["--help"]
