"""Continuous batching: requests join and leave a running batch at every step.

Problem. Decoding one sequence reads all weights for one token. Decoding eight reads them once for eight, if all eight
are ready at the same moment; requests come when they like, and end when they like.

Idea. Time goes in steps. A step lets waiting requests into free rows, computes one chunk of one prompt, and decodes one
token of every row that has its prompt. So a long prompt does not stop those who are writing (they wait one chunk), and
nobody waits for the longest answer of a batch.

    waiting ---> row: prompt, chunk by chunk ---> row: one token a step ---> done; the row keeps its tokens (`prefixes`)

A request draws its own random numbers and its row sees no other, so what it says depends on itself alone (up to the
order in which sums are made).

What may go wrong, and what happens then: a request whose `cancelled` is set leaves before the next step. When the
executor raises, or Ctrl-C strikes inside it, nobody knows what it has written: the rows that took part are emptied and
their requests end with "error"; the others go on.

With a drafter one request at a time, the oldest that is ready, decodes in rounds of drafts and one verification
(`speculative.loop`); the text stays the same.

Left out: preemption (a request that has a row keeps it), and priorities. Sources: Orca (OSDI 2022); Sarathi-Serve,
arXiv 2403.02310 (chunks between decode steps).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minicpm_ref.engine.executor import Executor, Logits
from minicpm_ref.engine.prefixes import Row, best_row, kind
from minicpm_ref.engine.request import Request
from minicpm_ref.sampling import choose_token
from minicpm_ref.speculative import Drafter, Speculation


@dataclass
class Job:
    """A request in its row. `fed` tokens of the prompt are in the cache. `speculation`: it decodes with drafts."""

    request: Request
    row: Row
    fed: int
    speculation: Speculation | None = None

    @property
    def ready(self) -> bool:
        """Whether its prompt is complete, so that it can decode."""
        return self.fed == len(self.request.prompt)


class Scheduler:
    """Runs requests on an executor, one `step` after the other; `submit` may be called from any thread."""

    def __init__(self, executor: Executor, chunk_length: int, drafter: Drafter | None = None):
        self.executor, self.chunk_length, self.drafter = executor, chunk_length, drafter
        self.rows = [Row(number) for number in range(executor.batch)]
        self.waiting: deque[Request] = deque()
        self.jobs: list[Job] = []  # in the order in which they were let in
        self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.jobs)

    def submit(self, request: Request) -> None:
        """Take a place in the queue."""
        self.waiting.append(request)

    def step(self) -> None:
        """Let in, compute one chunk of a prompt, decode one token of each row that is ready."""
        self._steps += 1
        try:
            self._drop_cancelled()
            self._admit()
            unfinished = [job for job in self.jobs if not job.ready]
            ready = [job for job in self.jobs if job.ready]  # who completes a prompt now decodes from the next step on
            if unfinished:
                self._run(self._prefill, unfinished[:1])
            plain = [job for job in ready if job.speculation is None]
            if plain:
                self._run(self._decode, plain)
            for job in ready:
                if job.speculation is not None:
                    self._run(self._speculate, [job])
        except BaseException as error:  # Ctrl-C: whoever drives must hear of it, and the next step must find order
            self._abandon(self.jobs, error)
            raise
        self._clear()

    def forget(self) -> None:
        """Empty the rows that nobody has."""
        taken = {job.row.number for job in self.jobs}
        for row in self.rows:
            if row.number not in taken:
                row.cut(0)
                self.executor.truncate(row.number, 0)

    # ---- the parts of a step ---------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for request in [*self.waiting, *(job.request for job in self.jobs)]:
            if request.cancelled:
                request.finish("cancelled")
        self._clear()

    def _clear(self) -> None:
        """Let go of what has ended."""
        self.jobs = [job for job in self.jobs if job.request.finish_reason is None]
        for _ in range(len(self.waiting)):  # others may append meanwhile, so the queue is turned, not replaced
            request = self.waiting.popleft()
            if request.finish_reason is None:
                self.waiting.append(request)

    def _admit(self) -> None:
        while self.waiting and len(self.jobs) < len(self.rows):
            taken = {job.row.number for job in self.jobs}
            free = [row for row in self.rows if row.number not in taken]
            request = self.waiting[0]
            row, kept = best_row(free, request.prompt, kind(self.executor.config, len(request.prompt)))
            drafter = None if any(job.speculation for job in self.jobs) else self.drafter
            if drafter is not None and drafter.layers:
                kept = 0  # a draft head must see what the target computed at every token of the prompt
            row.cut(kept)
            row.last_use = self._steps
            self.executor.truncate(row.number, kept)
            request.admitted(kept)
            job = Job(request, row, kept)
            if drafter is not None:
                job.speculation = Speculation(self.executor, row.number, drafter)
                if kept:
                    job.speculation.prefilled(request.prompt[:kept])
            self.jobs.append(job)
            self.waiting.popleft()

    def _run(self, work: Callable[[list[Job]], None], jobs: list[Job]) -> None:
        """Call `work(jobs)`; an error in it is theirs alone."""
        try:
            work(jobs)
        except Exception as error:
            self._abandon(jobs, error)

    def _abandon(self, jobs: Sequence[Job], error: BaseException) -> None:
        """What the rows of these jobs hold is unknown: empty them and end their requests."""
        for job in jobs:
            job.row.cut(0)
            self.executor.truncate(job.row.number, 0)
            job.request.finish("error", error)
        self._clear()

    def _prefill(self, jobs: list[Job]) -> None:
        (job,) = jobs
        prompt = job.request.prompt
        chunk = prompt[job.fed : job.fed + self.chunk_length]
        logits = self.executor.prefill(job.row.number, chunk, final_length=len(prompt))
        job.row.append(chunk, [kind(self.executor.config, len(prompt))] * len(chunk))
        job.fed += len(chunk)
        if job.speculation is not None:
            job.speculation.prefilled(chunk)
        if job.ready:
            self._choose(job, logits)

    def _decode(self, jobs: list[Job]) -> None:
        tokens = [job.request.output[-1] for job in jobs]
        logits = self.executor.decode([job.row.number for job in jobs], tokens)
        for job, token, own in zip(jobs, tokens, logits, strict=True):
            job.row.append([token], [kind(self.executor.config, len(job.row.tokens) + 1)])
            job.request.statistics.passes += 1
            self._choose(job, own)

    def _choose(self, job: Job, logits: Logits) -> None:
        request = job.request
        request.take(choose_token(logits, request.params, request.uniform(), request.prompt, request.output), logits)

    def _speculate(self, jobs: list[Job]) -> None:
        """One round of drafts and verification: at least one token, all of them as `_decode` would have chosen."""
        (job,) = jobs
        assert job.speculation is not None
        request, seen = job.request, []

        def choose(logits: Logits, ahead: list[int]) -> int:
            seen.append(logits)
            output = [*request.output, *ahead]
            return choose_token(logits, request.params, request.uniform(), request.prompt, output)

        root, most = request.output[-1], request.limit - len(request.output)
        emitted = job.speculation.round(root, choose, most, request.stop_ids)
        for token in (root, *emitted[:-1]):  # the last one is the next root: it is not in the cache
            job.row.append([token], [kind(self.executor.config, len(job.row.tokens) + 1)])
        request.statistics.passes += 1
        for token, logits in zip(emitted, seen, strict=True):
            if request.finish_reason is None:  # a stop string may end the text in the middle of a round
                request.take(token, logits)
