# One image for CPU and CUDA.
#
#   docker build -t pytorchlib .
#       torch from the packages' own index: CUDA builds, which also run on a CPU
#   docker build -t pytorchlib --build-arg TORCH_INDEX=ADDRESS .
#       torch from an index of CPU builds (pytorch.org names it under "Get started"): far smaller
#   docker build -t pytorchlib --build-arg COMPILER= .
#       without the C++ compiler, and so without torch.compile
#
# It listens on every address, and so starts with a key (PYTORCHLIB_API_KEY) or with --no-auth only.

ARG PYTHON_IMAGE=python:3.13-slim-trixie

FROM ${PYTHON_IMAGE} AS dependencies
ARG TORCH_INDEX=
ENV UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 UV_PYTHON=/opt/pytorchlib/bin/python
WORKDIR /build
COPY requirements.lock requirements-build.lock ./
RUN pip install --no-cache-dir --requirement requirements-build.lock \
    && python -m venv --without-pip /opt/pytorchlib
# The lock holds the hashes of the CUDA builds, so another index replaces torch's own lines.
RUN if [ -n "$TORCH_INDEX" ]; then \
        grep --extended-regexp --only-matching '^torch(vision)?==[^ ]+' requirements.lock > torch.txt \
        && uv pip install --no-deps --index-url "$TORCH_INDEX" --requirement torch.txt \
        && awk '/^[a-z]/ { keep = !/^(torch|torchvision|triton|nvidia-.*|cuda-.*)==/ } keep' \
            requirements.lock > rest.lock \
        && mv rest.lock requirements.lock; \
    fi \
    && uv pip install --no-deps --require-hashes --requirement requirements.lock

FROM dependencies AS application
COPY pyproject.toml README.md LICENSE ./
COPY models models
COPY training training
COPY app app
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
# torch.compile writes C++ while the service runs; Python's headers are in the image already.
ARG COMPILER=g++
RUN if [ -n "$COMPILER" ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends "$COMPILER" \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && useradd --uid 10001 --no-create-home --home-dir /var/cache/pytorchlib \
        --shell /usr/sbin/nologin pytorchlib \
    && install --directory --owner 10001 --group 10001 /var/lib/pytorchlib /var/cache/pytorchlib
# Two layers, because dependencies are large and change seldom.
COPY --from=dependencies /opt/pytorchlib /opt/pytorchlib
RUN --mount=type=bind,from=application,source=/wheels,target=/wheels \
    pip --python /opt/pytorchlib/bin/python install --no-cache-dir --no-deps --no-index /wheels/*.whl
ENV PATH=/opt/pytorchlib/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTORCHLIB_HOME=/var/lib/pytorchlib \
    PYTORCHLIB_HOST=0.0.0.0 \
    PYTORCHLIB_PORT=8000 \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/pytorchlib/inductor
USER 10001:10001
WORKDIR /var/lib/pytorchlib
VOLUME ["/var/lib/pytorchlib", "/var/cache/pytorchlib"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PYTORCHLIB_PORT\"]}/livez', timeout=4)"]
ENTRYPOINT ["pytorchlib"]
CMD ["serve"]
