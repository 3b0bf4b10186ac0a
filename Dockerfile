# One image for the migration and for the four services: docker-compose.yml says what each runs.
FROM python:3.12.12-slim-bookworm

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    PYTHONWARNINGS=ignore \
    QUEUE_DATA_DIR=/var/lib/nameko

RUN useradd --system --uid 10001 --no-create-home nameko \
 && install -d -o nameko -g nameko "$QUEUE_DATA_DIR"

WORKDIR /app

# As in the Makefile: nameko-sqlalchemy comes as source only. It is built with the lock's
# setuptools, which therefore goes first: nothing that the lock does not name is fetched or run.
COPY requirements.lock ./
RUN sed -n '/^setuptools==/,/[^\]$/p' requirements.lock > /tmp/setuptools.lock \
 && pip install --require-hashes -r /tmp/setuptools.lock \
 && pip install --require-hashes --no-build-isolation --use-pep517 -r requirements.lock \
 && rm /tmp/setuptools.lock

COPY pyproject.toml README.md config.yml ./
COPY shared shared
COPY services services
# compiled here, since whoever runs it may not write here
RUN pip install --no-deps --no-build-isolation --editable . \
 && python -m compileall -q shared services

USER 10001
