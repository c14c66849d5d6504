"""Settings of the services: one frozen object each, built once in `__main__` from flags, then environment, then defaults (`flags.py`).

Every field is a flag (`--kv-memory`) and an environment variable (`SPLITFIRE_KV_MEMORY`); a flag wins, an empty variable
counts as unset. What cannot be used stops the process before it listens anywhere: ConfigError, one line, exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from splitfire.core import limits
from splitfire.core.values import Bytes, Dtype, KvDtype, Port, checked_by, parse_addresses, parse_cpus, power_of_two

ENV_PREFIX = "SPLITFIRE_"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServiceSettings(BaseSettings):
    """What router and workers share."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", cli_kebab_case=True, cli_avoid_json=True,
        cli_exit_on_error=False, cli_hide_none_type=True, cli_implicit_flags=True,
    )  # fmt: skip

    model: str = Field("pico", description="pico, a model directory, or a hub id")
    insecure: bool = Field(False, description="allow addresses that other hosts can reach without TLS and credentials")
    max_context: int | None = Field(None, ge=16, le=limits.MAX_POSITIONS, description="tokens, prompt and output; the model's own")
    fleet_token_file: Path | None = Field(None, description="file with the secret that router and workers share")
    fleet_tls_cert: Path | None = Field(None, description="PEM certificate that says what this process is in the fleet")
    fleet_tls_key: Path | None = Field(None, description="PEM key of fleet_tls_cert")
    fleet_tls_ca: Path | None = Field(None, description="PEM certificate of who signed those of the whole fleet")
    trace_file: Path | None = Field(None, description="write spans to this file, for Perfetto")
    metrics_host: str = Field("127.0.0.1", description="address of the metrics port")
    metrics_port: Port | None = Field(None, description="Prometheus metrics over HTTP; default: off; 0 draws a port")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line to write")

    @property
    def has_fleet_tls(self) -> bool:
        return self.fleet_tls_cert is not None

    @model_validator(mode="after")
    def _whole_identity(self) -> Self:
        _require_together(self, "fleet_tls_cert", "fleet_tls_key", "fleet_tls_ca")
        return self


def _require_together(settings: BaseSettings, *names: str) -> None:
    missing = [name for name in names if getattr(settings, name) is None]
    if 0 < len(missing) < len(names):
        raise ValueError(f"{' and '.join(names)} belong together: {' and '.join(missing)} is missing")


def _require_loopback(settings: ServiceSettings, **hosts: str) -> None:
    for name, host in hosts.items():
        if host not in LOOPBACK and not settings.insecure:
            raise ValueError(f"{name} {host} can be reached from other machines in clear text: use 127.0.0.1, or --insecure")


class RouterSettings(ServiceSettings):
    """The router."""

    host: str = Field("127.0.0.1", description="address clients connect to")
    port: Port = Field(7070, description="port clients connect to; 0 draws one")
    http_port: Port | None = Field(None, description="port of OpenAI's API over HTTP, at host; default: off; 0 draws one")
    files_dir: Path | None = Field(
        None, description="directory of OpenAI's files and batches, which routers of one machine may share; default: there are none"
    )
    files_bytes: Bytes = Field(16 << 30, ge=1 << 20, description="all files together, of all tenants")
    batch_requests: int = Field(
        8,
        ge=1,
        le=1024,
        description="requests of batches that are in flight, of this router; those of class batch come last anyway",
    )
    worker_host: str = Field("127.0.0.1", description="address workers connect to")
    worker_port: Port = Field(7071, description="port workers connect to; 0 draws one")
    model_name: str = Field(
        "", max_length=limits.MAX_MODEL_NAME_CHARS, description="what clients call the model; default: MODEL's own name"
    )
    keys_file: Path | None = Field(None, description="TOML file of tenants and the hashes of their API keys; read again on SIGHUP")
    tls_cert: Path | None = Field(None, description="PEM certificate that clients see, with those between it and its authority")
    tls_key: Path | None = Field(None, description="PEM key of tls_cert")
    split: Literal["always", "auto", "never"] = Field(
        "auto", description="prefill elsewhere: always, when a prefill worker is there, never"
    )
    local_fallback: bool = Field(
        True, description="with split auto: decode workers compute prompts while no prefill worker is there"
    )
    placement: Literal["cost", "round_robin", "least_loaded", "power_of_two", "random"] = Field(
        "cost", description="how workers are chosen: by predicted seconds, or in one of the simple ways it is compared with"
    )
    ttft_target_s: float = Field(
        30.0,
        gt=0,
        le=limits.MAX_DEADLINE_S,
        description="predicted to wait longer for its first token, a request is refused at once",
    )
    max_requests: int = Field(256, ge=1, le=limits.MAX_RUNNING_REQUESTS, description="requests in flight, all workers together")
    max_queued: int = Field(limits.MAX_QUEUED_REQUESTS, ge=0, le=limits.MAX_QUEUED_REQUESTS, description="requests that may wait")
    max_queued_s: float = Field(
        limits.MAX_QUEUED_S,
        gt=0,
        le=limits.MAX_DEADLINE_S,
        description="seconds a request may wait for a worker; then it is refused",
    )
    share_port: bool = Field(
        False, description="other routers of this machine may listen on the same port; each gets some connections"
    )
    canary: bool = Field(False, description="try workers that have had no work for 10 s with a request of one token")
    rebalance: bool = Field(False, description="move workers between the roles when one side starves and the other could spare one")
    reflection: bool | None = Field(
        None, description="gRPC server reflection; default: on when bound to loopback, without a keys_file"
    )
    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description="vllm: the metrics that autoscalers and gateways read, by vLLM's names too"
    )
    usage_file: Path | None = Field(None, description="append a line for each request: tenant, key, tokens, seconds of workers")
    prices_file: Path | None = Field(
        None, description="TOML file of prices by model; lines of usage_file then say what a request cost"
    )
    router_grace_s: float = Field(30.0, ge=0, le=3600, description="seconds open requests get after SIGTERM")

    @model_validator(mode="after")
    def _safe_binds(self) -> RouterSettings:
        _require_loopback(self, metrics_host=self.metrics_host)
        _require_together(self, "tls_cert", "tls_key")
        if self.host not in LOOPBACK and not self.insecure and (self.tls_cert is None or self.keys_file is None):
            raise ValueError(
                f"host {self.host} can be reached from other machines: give --tls-cert, --tls-key and --keys-file, or --insecure"
            )
        has_consent = self.insecure and self.fleet_token_file is not None
        if self.worker_host not in LOOPBACK and not self.has_fleet_tls and not has_consent:
            raise ValueError(
                f"worker_host {self.worker_host} can be reached from other machines: give --fleet-tls-cert, --fleet-tls-key and "
                "--fleet-tls-ca, or both --fleet-token-file and --insecure"
            )
        if self.prices_file is not None and self.usage_file is None:
            raise ValueError("prices_file is of no use without usage_file: give both")
        if 0 < self.port == self.worker_port and self.host == self.worker_host:
            raise ValueError(f"port and worker_port are both {self.port}: clients and workers need a port each")
        if self.files_dir is not None and self.http_port is None:
            raise ValueError(f"files_dir is {self.files_dir}, but nobody could reach it: give --http-port too")
        if self.http_port and self.http_port in (self.port, self.worker_port):
            raise ValueError(f"http_port is {self.http_port}, which is another port's too: gRPC, HTTP and workers need one each")
        return self


class WorkerSettings(ServiceSettings):
    """A worker of either role."""

    role: Literal["prefill", "decode"] = Field("decode", description="what it announces itself as")
    router: Annotated[str, checked_by(parse_addresses)] = Field(
        "127.0.0.1:7071", min_length=3, description="worker ports of all routers, comma separated; of a name, every address it has"
    )
    worker_id: str = Field(
        "", description="name in logs and fleet; default: the role and a random number", max_length=limits.MAX_WORKER_ID_CHARS
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="where the model runs")
    tensor_parallel: int = Field(
        1, ge=1, le=8, description="ranks that share the model, each with a GPU of its own or a share of the CPU's threads"
    )
    kernels: Literal["auto", "torch"] = Field(
        "auto", description="torch: the reference everywhere; auto: what was compiled for this machine, torch otherwise"
    )
    dtype: Dtype = Field(
        "auto",
        description="of computation, and of weights not in int8; auto: the checkpoint's, fp32 on a CPU that torch alone would be slow on",
    )
    weights: Literal["auto", "int8"] = Field(
        "auto",
        description="of matrices: int8 with a scale a row, made while loading; auto: on a GPU what a quantised checkpoint holds, else dtype",
    )
    kv_dtype: KvDtype = Field(
        "auto", description="of the KV pool: bf16, fp16, fp32, int8 or fp8_e4m3; auto: the dtype of computation"
    )
    block_size: Annotated[int, Field(ge=8, le=256), AfterValidator(power_of_two)] = Field(32, description="tokens a KV block")
    kv_memory: Bytes | None = Field(
        None, ge=1 << 20, description="a rank's KV pool, such as 512MiB; default: one sequence of max_context, at least 128MiB"
    )
    chunk_tokens: int | None = Field(None, ge=16, le=65536, description="tokens one step computes at most; default: by device")
    saturating_rows: int | None = Field(
        None, ge=1, le=65536, description="tokens of one step up to which several prompts share it; default: by device"
    )
    max_running: int = Field(64, ge=1, le=1024, description="sequences in one batch")
    speculate: Literal["off", "auto", "lookup", "predicted", "model"] = Field(
        "auto", description="who drafts on decode workers: nobody, whoever pays, or one drafter alone, where it pays"
    )
    draft_model: str = Field("", description="small model with the same tokenizer that drafts, such as pico-draft for pico")
    prefix_cache: bool = Field(True, description="keep finished KV for prompts that begin alike")
    cpus: Annotated[str, checked_by(parse_cpus)] = Field("", description="processors to run on, such as 0 or 0,2-3; default: all")
    threads: int | None = Field(None, ge=1, le=1024, description="threads of the model; default: one a processor")
    slot_size: Bytes = Field(4 << 20, ge=64 << 10, le=limits.MAX_SLOT_BYTES, description="size of one ring slot")
    send_slots: int = Field(2, ge=1, le=256, description="ring slots for sending to one peer")
    receive_slots: int = Field(4, ge=2, le=256, description="ring slots for receiving from one peer")
    max_peers: int = Field(16, ge=1, le=limits.MAX_WORKERS, description="workers of the other role that get ring slots")
    kv_digest: bool = Field(True, description="verify every KV block that arrives")
    transport: Literal["ucx", "tcp"] = Field("ucx", description="what carries KV; every worker of a fleet uses the same")
    ucx_devices: str = Field("lo", description="network devices UCX may use; lo: this host only; all: every one")
    tcp_host: str = Field("127.0.0.1", description="address that transport tcp listens on")
    tcp_port: Port = Field(0, description="port that transport tcp listens on; 0 draws one")
    tcp_advertise: str = Field("", description="address that peers reach transport tcp by; default: tcp_host")
    status_host: str = Field("127.0.0.1", description="address of the health port")
    status_port: Port = Field(0, description="gRPC health; 0 draws a port")
    health_file: Path | None = Field(None, description="a file that is there, and touched every 5 s, while the worker is healthy")
    metrics_targets: Path | None = Field(
        None, description="directory where a file tells Prometheus (file_sd) of the metrics port, while the worker runs"
    )
    allow_nonfinite: bool = Field(False, description="load weights that hold NaN or infinite values")
    drain_grace_s: float | None = Field(None, ge=0, le=3600, description="seconds after SIGTERM; default: 35 prefill, 60 decode")

    @model_validator(mode="after")
    def _relations(self) -> WorkerSettings:
        _require_loopback(self, status_host=self.status_host, tcp_host=self.tcp_host, metrics_host=self.metrics_host)
        remote = [address for address in self.routers if address.rpartition(":")[0].strip("[]") not in LOOPBACK]
        if remote and not self.has_fleet_tls and not self.insecure:
            raise ValueError(
                f"router {remote[0]} is reached in clear text: give --fleet-tls-cert, --fleet-tls-key and --fleet-tls-ca, or --insecure"
            )
        if self.ucx_devices != "lo" and not self.insecure:
            raise ValueError(f"ucx_devices {self.ucx_devices} carries KV in clear text between hosts: use lo, or --insecure")
        if self.role == "prefill" and self.drain_grace_s is not None and self.drain_grace_s <= limits.HOLD_S:
            raise ValueError(f"drain_grace_s of a prefill worker must exceed the hold deadline of {limits.HOLD_S:g} s")
        if self.metrics_targets is not None and self.metrics_port is None:
            raise ValueError("metrics_targets is told of the metrics port, and there is none: give --metrics-port, 0 draws one")
        if self.speculate == "model" and not self.draft_model:
            raise ValueError("speculate is model, and draft_model names none: give --draft-model")
        if self.draft_model and self.speculate not in ("auto", "model"):
            raise ValueError(f"draft_model is {self.draft_model}, but speculate is {self.speculate}: use auto or model")
        if self.chunk_tokens is not None and self.chunk_tokens < self.block_size:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}, less than block_size = {self.block_size}")
        return self

    @property
    def cpu_numbers(self) -> tuple[int, ...]:
        return parse_cpus(self.cpus)

    @property
    def speculates(self) -> bool:
        """Only workers that generate do."""
        return self.speculate != "off" and self.role == "decode"

    @property
    def uses_draft_model(self) -> bool:
        return self.speculates and bool(self.draft_model)

    @property
    def routers(self) -> tuple[str, ...]:
        return parse_addresses(self.router)

    @property
    def grace_s(self) -> float:
        return self.grace_of(self.role)

    def grace_of(self, role: str) -> float:
        """Of a worker that has this role when it is told to end."""
        if self.drain_grace_s is not None:
            return self.drain_grace_s
        return 35.0 if role == "prefill" else 60.0
