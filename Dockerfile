# One image for every service; what a container is, its command says.
#
#   docker build -t fusionroute .
#   docker build -t fusionroute --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .   (small, CPU)
#
# Wheels laid into ./wheels are preferred to downloaded ones.

FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The dependencies change seldom: a layer of their own. `wheels*` may match nothing.
COPY constraints.txt pyproject.toml wheels* /src/wheels/
RUN cd wheels \
 && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['cpu'], sep='\n')" >requirements.txt \
 && pip install --find-links . --constraint constraints.txt --requirement requirements.txt hatchling

COPY pyproject.toml README.md LICENSE /src/
COPY fusionroute /src/fusionroute
COPY expert_service /src/expert_service
COPY router_service /src/router_service
COPY trainer /src/trainer
COPY evaluation /src/evaluation
COPY presets /src/presets
RUN pip install --no-deps --no-build-isolation .


FROM python:3.11-slim
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin fusionroute \
 && install --directory --owner fusionroute /models /data /checkpoints
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface FUSIONROUTE_CACHE_DIR=/tmp/fusionroute XDG_STATE_HOME=/tmp/state \
    MPLCONFIGDIR=/tmp/matplotlib \
    FUSIONROUTE_EXPERT_LOG_FORMAT=json FUSIONROUTE_ROUTER_LOG_FORMAT=json FUSIONROUTE_TRAINER_LOG_FORMAT=json
USER fusionroute
WORKDIR /tmp
CMD ["fusionroute", "--help"]
