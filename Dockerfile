# One image for router and workers; compose.yaml says which one a container is.
FROM python:3.11-slim
WORKDIR /app
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# What is installed changes seldom, what is copied below often.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY splitfire splitfire
COPY kvtransfer kvtransfer
COPY prefill_svc prefill_svc
COPY decode_svc decode_svc
COPY router router
RUN PIP_CONSTRAINT=/app/constraints.txt pip install --no-cache-dir --disable-pip-version-check -e .
COPY models/pico models/pico

RUN useradd --uid 10001 --no-create-home splitfire
USER 10001
ENTRYPOINT ["splitfire"]
