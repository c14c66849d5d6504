"""Grammars by llguidance (Earley parser over a lexer of derivatives; github.com/guidance-ai/llguidance), held to limits.py.

Built on any thread, matched on the engine's. Every step is bounded by fuel, which does not depend on the machine; processor
time is only the last resort.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from splitfire.core import limits
from splitfire.core.errors import InvalidInput, ModelError, one_line
from splitfire.core.response_format import OutputGrammar
from splitfire.engine.constraint import WORD_BITS, ConstraintFailed, Mask, clear

TOO_COMPLEX, DEAD_END, BROKEN = "constraint_too_complex", "constraint_dead_end", "constraint_broken"
NOTHING_FITS = "NoExtension"  # what the library calls it when no token may follow
NOT_ALLOWED = "satisfy the grammar"  # and what it says of a token that may not


class GrammarCompiler:
    """What grammars are built for: one model's tokens. ModelError when the library cannot take the tokenizer."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        self._eos = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        if not self._eos:
            raise ModelError("config.json: names no end-of-sequence token, without one an output cannot be ended")
        try:
            self._tokenizer = LLTokenizer(str(tokenizer), n_vocab=vocab_size, eos_token=list(self._eos))
        except BaseException as exc:  # the library panics with a BaseException of its own
            raise ModelError(f"tokenizer.json: {one_line(str(exc), 200)}") from exc

    def compile(self, grammar: OutputGrammar) -> CompiledGrammar:
        """Milliseconds, without the interpreter's lock. InvalidInput when the library does not take it."""
        bounds = LLParserLimits(**grammar.parser_limits, verbose_errors=False)  # type: ignore[arg-type]
        matcher = LLMatcher(self._tokenizer, grammar.text, log_level=0, limits=bounds)
        if matcher.is_error():
            raise InvalidInput("response_format", one_line(matcher.get_error(), 200))
        return CompiledGrammar(matcher, self._vocab_size, self._eos)


class CompiledGrammar:
    """Implements `Grammar`: a matcher that has followed the first `num_followed` tokens of an output, and is not advanced itself.
    Its copies share its lexer and the bounds of that, so it is for one request and for nobody else."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: tuple[int, ...], num_followed: int = 0) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = eos
        self._num_followed = num_followed

    def after(self, output: Seq[int]) -> CompiledGrammar:
        """The same for outputs that begin with this one: the engine, which waits for `start`, need not follow it again."""
        matcher = self._matcher.deep_copy()
        matcher.consume_tokens(list(output[self._num_followed :]))  # an error stays, and is the first mask's
        return CompiledGrammar(matcher, self._vocab_size, self._eos, len(output))

    def start(self, output: Seq[int], stop_token_ids: frozenset[int]) -> GrammarState:
        state = GrammarState(self._matcher.deep_copy(), self._vocab_size, self._eos, stop_token_ids)
        for token_id in output[self._num_followed :]:
            state.advance(token_id)
        return state


class GrammarState:
    """Implements `Constraint`. Owned by the engine thread."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: tuple[int, ...], stop_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // WORD_BITS)
        self._eos = eos
        self._forbidden = tuple(token_id for token_id in eos if token_id not in stop_token_ids)
        self._mask: Mask | None = None  # of the present position, once asked for
        self._is_over = False
        self._failure = ""
        self._num_tokens = 0
        self._spent_s = 0.0

    def num_valid(self, drafts: Seq[int]) -> int:
        if self._failure or self.is_over:
            return 0
        began = time.thread_time()
        end = next((i for i, draft in enumerate(drafts) if draft in self._forbidden), len(drafts))
        num_valid = int(self._matcher.validate_tokens(list(drafts[:end])))
        self._charge(time.thread_time() - began)
        return num_valid

    def mask(self) -> Mask:
        if self.is_over or self._failure or self._mask is None:
            raise ConstraintFailed(self._failure or DEAD_END)
        return self._mask

    def advance(self, token_id: int) -> None:
        self._mask = None
        if self._failure:
            return
        began = time.thread_time()
        self._num_tokens += 1
        if not self._matcher.consume_token(token_id):
            self._failure = _reason(self._matcher.get_error())
        self._charge(time.thread_time() - began)

    @property
    def is_over(self) -> bool:
        if self._mask is None and not self._failure and not self._is_over:
            self._look()
        return self._is_over

    def _look(self) -> None:
        """Finds out what may come now, once for each position."""
        began = time.thread_time()
        mask = np.zeros(self._num_words, dtype=np.int32)
        can_end = self._matcher.is_accepting()
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            self._failure = _reason(self._matcher.get_error())
        elif _has_others(mask, self._eos):
            clear(mask, self._forbidden)
            self._mask = mask
        elif can_end:
            self._is_over = True
        else:
            self._failure = DEAD_END
        self._charge(time.thread_time() - began)

    def _charge(self, seconds: float) -> None:
        """All sequences of a worker wait for one that takes long."""
        self._spent_s += seconds
        most = limits.MASK_BURST_S + limits.MEAN_MASK_S * self._num_tokens
        if seconds > limits.MAX_MASK_S or self._spent_s > most:
            self._failure = self._failure or TOO_COMPLEX


def _reason(error: str) -> str:
    """Of a matcher's error, which it never recovers from."""
    if error.startswith(NOTHING_FITS):
        return DEAD_END
    return BROKEN if NOT_ALLOWED in error else TOO_COMPLEX


def _has_others(mask: Mask, token_ids: Seq[int]) -> bool:
    """Whether it allows any token but these."""
    rest = mask.copy()
    clear(rest, token_ids)
    return bool(rest.any())
