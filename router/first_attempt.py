"""The attempt that all choices of a request begin with: one prompt, one hand-off, forked at the worker that generates. Event loop only.

It is made once, for those of them that are still there; each waits for it, and goes on by itself when it has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from router.attempt import Attempt
from router.choice import Choice


class FirstAttempt:
    """`admit` makes it for the choices that are in the list when it finds a place; `abandon` takes one out of it again."""

    def __init__(
        self,
        choices: Sequence[Choice],
        admit: Callable[[list[Choice]], Awaitable[Attempt | None]],
        abandon: Callable[[Attempt, Choice], None],
    ) -> None:
        self._choices = list(choices)
        self._admit = admit
        self._abandon = abandon
        self._made: asyncio.Future[Attempt | None] | None = None

    async def get(self, choice: Choice) -> Attempt | None:
        """Waits for a place. A choice that is cancelled meanwhile is left out; with the last one the attempt is given up."""
        if self._made is None:
            self._made = asyncio.ensure_future(self._make())
        try:
            return await asyncio.shield(self._made)
        except asyncio.CancelledError:
            self._choices.remove(choice)
            if not self._made.done():
                if not self._choices:
                    self._made.cancel()
            elif not self._made.cancelled() and self._made.exception() is None and (attempt := self._made.result()) is not None:
                self._abandon(attempt, choice)
            raise

    async def _make(self) -> Attempt | None:
        attempt = await self._admit(self._choices)
        if attempt is not None:
            for choice in [c for c in attempt.choices.values() if c not in self._choices]:  # gone since it was placed
                self._abandon(attempt, choice)
        return attempt
