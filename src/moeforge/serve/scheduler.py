"""Who computes which tokens in the next step. vLLM's policy: no prefill and no decode, only tokens to catch up on.

All that is decided follows from the sequence of calls alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from moeforge.errors import RunError, UserError
from moeforge.serve.block_pool import BlockPool
from moeforge.serve.outputs import Sampled
from moeforge.serve.prefix_cache import PageDigests

if TYPE_CHECKING:
    from moeforge.serve.request import Request


class WaitingQueueFull(RunError):
    """`max_waiting` requests wait already; nothing was added."""


@dataclass(slots=True)  # not frozen: that makes them three times slower to make, 256 a step
class ScheduledRequest:
    """`count` tokens of a request, the first at position `begin`; `samples`: with the last it knows, so that its next
    token is drawn."""

    request: Request
    begin: int
    count: int
    samples: bool


class Scheduler:
    """Divides each step's tokens among the requests, and the pages of the KV cache too.

    num_blocks, block_size   the KV cache: pages, and positions of a page
    max_num_seqs             most requests that run at once
    max_num_batched_tokens   most tokens of a step
    max_waiting              most added requests that wait for their first place
    prefix_caching           share pages of equal beginnings among requests of one `cache_salt`

    Running requests come first, in the order in which they began, then the waiting ones in the order in which they
    came, while there are places, tokens, and pages for all that the next one has. What does not fit into a step's
    tokens goes on in the next, so only the last running request can be behind, and none ever stands still. If pages run
    out, the last running request is preempted: it gives up its pages, waits before all others, and computes its tokens
    again. The first one always gets on, since `add` refuses what would not fit into the empty cache.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int,
        prefix_caching: bool,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_waiting = max_waiting
        self.prefix_caching = prefix_caching
        self.running: list[Request] = []
        self._preempted: deque[Request] = deque()
        self._new: deque[Request] = deque()
        self._digests: dict[tuple[str, int], PageDigests | None] = {}  # of every request here; None without caching
        self.preemptions = 0
        # Of requests at their first admission: one that finds its own pages again has not shared anything.
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests without a place, the next one first."""
        return (*self._preempted, *self._new)

    @property
    def num_waiting(self) -> int:
        """Requests without a place, preempted ones too."""
        return len(self._preempted) + len(self._new)

    @property
    def num_running(self) -> int:
        """Requests with a place."""
        return len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.running or self._preempted or self._new)

    @property
    def kv_cache_usage(self) -> float:
        """Pages in use over all pages. Free pages that are kept in case their beginning comes again count as free."""
        return 1 - self.pool.num_free / self.pool.num_blocks

    def add(self, request: Request) -> None:
        """Lets a request wait.

        Raises UserError for one that could not finish even if it had all pages, or whose id (and index) is in use, and
        WaitingQueueFull.
        """
        key = (request.request_id, request.index)
        if key in self._digests:
            raise UserError(f"request_id = {request.request_id!r}: must be unused; this one is still being served")
        positions = self.pool.num_blocks * self.pool.block_size
        most = positions + 1 - request.num_tokens  # the last token is never computed on
        if request.room > most:
            had = f"max_tokens = {request.room}: after {request.num_tokens} prompt tokens must be at most {most}"
            if most < 1:
                had = f"prompt = {request.num_tokens} tokens: must be at most {positions}"
            raise UserError(
                f"{had}, as the KV cache has {positions} positions; ask for less, or serve with more memory for it "
                "(kv_cache_memory_bytes, gpu_memory_utilization), or with max_model_len within it"
            )
        if len(self._new) >= self.max_waiting:
            raise WaitingQueueFull(f"max_waiting = {self.max_waiting}: as many requests wait already")
        self._digests[key] = PageDigests(request.cache_salt, self.pool.block_size) if self.prefix_caching else None
        self._new.append(request)

    def abort(self, request_id: str) -> list[Request]:
        """Ends all requests of this id, which are returned; their pages are free at once. May be called at any moment,
        also between `schedule` and `update`."""
        aborted = [r for r in chain(self.running, self._preempted, self._new) if r.request_id == request_id]
        if aborted:
            for request in aborted:
                request.abort()
                self._forget(request)
            self.running = [r for r in self.running if r.request_id != request_id]
            self._preempted = deque(r for r in self._preempted if r.request_id != request_id)
            self._new = deque(r for r in self._new if r.request_id != request_id)
        return aborted

    def schedule(self) -> tuple[ScheduledRequest, ...]:
        """What the next step computes; empty if there is nothing to do. Each step must be given to `update` before the
        next is scheduled."""
        step: list[ScheduledRequest] = []
        budget = self.max_num_batched_tokens
        preemptions = self.preemptions
        while budget and len(step) < len(self.running):
            request = self.running[len(step)]
            begin = request.num_computed_tokens
            missing = request.num_tokens - begin
            count = min(missing, budget)
            if self._grow(request, begin + count):
                step.append(ScheduledRequest(request, begin, count, count == missing))
                budget -= count
        if self.preemptions != preemptions:  # there are no pages for others
            return tuple(step)
        while budget and len(self.running) < self.max_num_seqs and (queue := self._preempted or self._new):
            request = queue[0]
            if not self._admit(request):
                break
            queue.popleft()
            begin = request.num_computed_tokens
            missing = request.num_tokens - begin
            count = min(missing, budget)
            self._grow(request, begin + count)
            step.append(ScheduledRequest(request, begin, count, count == missing))
            budget -= count
        return tuple(step)

    def update(self, step: Sequence[ScheduledRequest], sampled: Sequence[Sampled]) -> None:
        """Takes in what `step` computed: a token for each request of it that samples, in this order.

        Requests aborted since then are passed over, and their tokens dropped.
        """
        tokens = iter(sampled)
        for scheduled in step:
            request = scheduled.request
            token = next(tokens) if scheduled.samples else None
            if request.finish_reason is not None:
                continue
            request.num_computed_tokens = scheduled.begin + scheduled.count
            self._register(request, scheduled.begin)
            if token is not None:
                request.append(token)
        finished = [request for request in self.running if request.finish_reason is not None]
        if finished:
            for request in finished:
                self._forget(request)
            self.running = [request for request in self.running if request.finish_reason is None]

    def check(self) -> None:
        """Raises RunError if a page was lost, or is held by a request that does not run."""
        self.pool.check([request.block_ids for request in self.running])
        if any(request.block_ids for request in self.waiting):
            raise RunError("KV cache: a waiting request holds pages")

    def _grow(self, request: Request, positions: int) -> bool:
        """Gives a running request pages for so many positions, preempting the last ones for them; False if it was the
        last itself."""
        missing = self.pool.blocks_for(positions) - len(request.block_ids)
        if missing > 0:
            while missing > self.pool.num_free:
                last = self.running.pop()
                self._release(last)
                self._preempted.appendleft(last)
                self.preemptions += 1
                if last is request:
                    return False
            request.block_ids += self.pool.allocate(missing)
        return True

    def _admit(self, request: Request) -> bool:
        """Lets a request run, with the pages that hold its beginning already; False if all it has would not fit now."""
        if not self.pool.num_free:  # the page of the last token is never a shared one
            return False
        found: list[int] = []
        digests = self._digests[request.request_id, request.index]
        if digests is not None:
            # At least the last token is computed: the next one is drawn from its logits.
            pages = range((request.num_tokens - 1) // self.pool.block_size)
            found = self.pool.find(digests.page(page, request.all_token_ids) for page in pages)
        if self.pool.blocks_for(request.num_tokens) - len(found) > self.pool.num_free_beside(found):
            return False
        self.pool.share(found)
        request.block_ids += found
        request.num_computed_tokens = len(found) * self.pool.block_size
        if digests is not None and not self._preempted:
            self.prefix_queries_tokens += request.num_tokens
            self.prefix_hits_tokens += request.num_computed_tokens
        self.running.append(request)
        return True

    def _register(self, request: Request, begin: int) -> None:
        """Lets the pages be found that were filled since position `begin`."""
        block_size = self.pool.block_size
        first, end = begin // block_size, request.num_computed_tokens // block_size
        if first < end and (digests := self._digests[request.request_id, request.index]) is not None:
            for page in range(first, end):
                self.pool.register(request.block_ids[page], digests.page(page, request.all_token_ids))

    def _release(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids.clear()
        request.num_computed_tokens = 0

    def _forget(self, request: Request) -> None:
        self._release(request)
        del self._digests[request.request_id, request.index]
