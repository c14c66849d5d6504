# One image for router and workers; compose.yaml says which one a container is. Built in one stage, with a compiler, and run
# in another, without.
FROM python:3.11-slim AS build
WORKDIR /app
# Without g++ everything works too: torch then does what is compiled otherwise.
RUN apt-get update && apt-get install -y --no-install-recommends g++ || echo "no compiler here: packing will run in torch"
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# What is installed changes seldom, what is copied below often.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY splitfire splitfire
COPY kvtransfer kvtransfer
COPY prefill_svc prefill_svc
COPY decode_svc decode_svc
COPY router router
RUN PIP_CONSTRAINT=/app/constraints.txt pip install --no-cache-dir --disable-pip-version-check -e .

FROM python:3.11-slim
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
COPY models/pico models/pico

RUN useradd --uid 10001 --no-create-home splitfire
USER 10001
ENTRYPOINT ["splitfire"]
