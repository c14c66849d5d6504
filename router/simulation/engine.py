"""What a worker is like, in numbers: what prompts and steps cost, how much KV it holds, how fast it ships. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from router.costs import PromptCost


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step that only decodes: `base_s`, for each sequence, and for each token of their contexts."""

    base_s: float
    sequence_s: float = 0.0
    context_s: float = 0.0

    def seconds(self, num_sequences: int, num_context: int) -> float:
        return self.base_s + num_sequences * self.sequence_s + num_context * self.context_s


@dataclass(frozen=True, slots=True)
class Engine:
    """One worker's. `num_blocks` are the pool's; `max_cached` bounds those of them that may have names."""

    prompt: PromptCost
    step: StepCost
    num_blocks: int
    block_size: int
    chunk_tokens: int
    block_bytes: int = 0
    bytes_per_s: float = 1e10  # to a decode worker
    max_running: int = 256
    max_cached: int | None = None
    is_fifo: bool = False  # else the least work first, with ageing
    overhead_s: float = 0.0  # of a first token, beside its prompt; nobody else waits for it
    shares_steps: bool = True  # else prompts and sequences do not disturb one another
    # Workers of one machine share its memory and processors: so many times as long a prompt takes while another worker decodes all the
    # time, and a step while another one computes prompts all the time.
    prompt_beside: float = 1.0
    step_beside: float = 1.0

    def beside(self, of_prompts: float, of_steps: float) -> Engine:
        """As it is where, for these shares of the time in which prompts are computed and steps decode, workers of the other role are busy."""
        slower = 1 + (self.prompt_beside - 1) * of_prompts
        prompt = PromptCost(self.prompt.base_s * slower, self.prompt.token_s * slower, self.prompt.pair_s * slower)
        slower = 1 + (self.step_beside - 1) * of_steps
        step = StepCost(self.step.base_s * slower, self.step.sequence_s * slower, self.step.context_s * slower)
        return replace(self, prompt=prompt, step=step)

    def times(self, factor: float) -> Engine:
        """So many of them as one: as much memory, as fast."""
        prompt, step = self.prompt, self.step
        return replace(
            self,
            prompt=PromptCost(prompt.base_s / factor, prompt.token_s / factor, prompt.pair_s / factor),
            step=StepCost(step.base_s, step.sequence_s / factor, step.context_s / factor),
            num_blocks=int(self.num_blocks * factor),
            chunk_tokens=int(self.chunk_tokens * factor),
            max_cached=int(self.max_cached * factor) if self.max_cached is not None else None,
            max_running=int(self.max_running * factor),
        )
