"""Our frozen objects to and from the messages between router and workers. Shapes only; ranges are `validation.py`'s."""

from __future__ import annotations

from splitfire.core.fingerprint import Fingerprint
from splitfire.core.layout import KvLayout
from splitfire.core.response_format import OutputGrammar
from splitfire.core.sampling import SamplingParams, StopParams, TokenBias
from splitfire.v1 import fleet_pb2 as pb


def sampling_to_wire(params: SamplingParams) -> pb.ResolvedSampling:
    return pb.ResolvedSampling(
        temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, min_p=params.min_p,
        repetition_penalty=params.repetition_penalty, presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty, seed=params.seed,
        logit_bias={entry.token_id: entry.bias for entry in params.logit_bias}, logprobs=params.logprobs,
    )  # fmt: skip


def sampling_from_wire(wire: pb.ResolvedSampling) -> SamplingParams:
    return SamplingParams(
        temperature=wire.temperature, top_p=wire.top_p, top_k=wire.top_k, min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty, presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty, seed=wire.seed,
        logit_bias=tuple(TokenBias(token_id, bias) for token_id, bias in sorted(wire.logit_bias.items())),
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
    )  # fmt: skip


def stopping_to_wire(stopping: StopParams) -> pb.ResolvedStopping:
    return pb.ResolvedStopping(
        max_tokens=stopping.max_tokens, min_tokens=stopping.min_tokens, stop_token_ids=sorted(stopping.stop_token_ids)
    )


def stopping_from_wire(wire: pb.ResolvedStopping) -> StopParams:
    return StopParams(wire.max_tokens, wire.min_tokens, frozenset(wire.stop_token_ids))


def grammar_to_wire(grammar: OutputGrammar) -> pb.OutputGrammar:
    return pb.OutputGrammar(type=grammar.kind, text=grammar.text)


def grammar_from_wire(wire: pb.OutputGrammar) -> OutputGrammar:
    return OutputGrammar(wire.type, wire.text)


def fingerprint_to_wire(fingerprint: Fingerprint) -> pb.ModelFingerprint:
    return pb.ModelFingerprint(
        weights=fingerprint.weights, config=fingerprint.config, tokenizer=fingerprint.tokenizer, rope=fingerprint.rope,
        weight_format=fingerprint.weight_format, block_size=fingerprint.block_size, protocol_major=fingerprint.protocol_major,
    )  # fmt: skip


def fingerprint_from_wire(wire: pb.ModelFingerprint) -> Fingerprint:
    return Fingerprint(
        wire.weights, wire.config, wire.tokenizer, wire.rope, wire.weight_format, wire.block_size, wire.protocol_major
    )  # fmt: skip


def layout_to_wire(layout: KvLayout) -> pb.KvFormat:
    """One rank of one; tensor parallel pairs will send head ranges."""
    return pb.KvFormat(
        dtype=layout.dtype, num_layers=layout.num_layers, num_kv_heads=layout.num_kv_heads, head_dim=layout.head_dim,
        block_size=layout.block_size, tp_size=1, tp_rank=0,
    )  # fmt: skip


def layout_from_wire(wire: pb.KvFormat) -> KvLayout:
    """Any numbers; `KvLayout.converts_to` says whether they can be used."""
    return KvLayout(wire.dtype, wire.num_layers, wire.num_kv_heads, wire.head_dim, wire.block_size)


def trace_id_of(traceparent: str) -> str:
    """Of W3C's header; empty where there is none."""
    return traceparent[3:35]
