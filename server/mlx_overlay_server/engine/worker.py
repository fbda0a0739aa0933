"""The engine's thread, the only one that uses MLX: it loads models and steps their sequences in continuous batches.

Under `mlx.launch` every rank runs this loop on the same commands, which rank 0 shares; so everything here is decided by
commands and by what the model says alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from mlx_overlay_server import garbage
from mlx_overlay_server.engine.admission import Admission
from mlx_overlay_server.engine.commands import (
    Cancel,
    Command,
    DiskStats,
    Encode,
    Item,
    Load,
    ReadTokenizer,
    Sampled,
    Stats,
    Stop,
    Submit,
    Unload,
    is_last,
)
from mlx_overlay_server.engine.failures import failure, first_line, is_late, no_memory
from mlx_overlay_server.engine.incoming import Incoming, Reports
from mlx_overlay_server.engine.outbox import Outbox
from mlx_overlay_server.errors import PromptTooLong, Unavailable
from mlx_overlay_server.imports import UNUSED, left_out
from mlx_overlay_server.memory import GROWTH, SPARE, Shares, shares
from mlx_overlay_server.settings import EngineOptions

if TYPE_CHECKING:
    from mlx_overlay_server.engine.incoming import AnyRunner
    from mlx_overlay_server.engine.prefix_cache import PrefixCache
    from mlx_overlay_server.engine.ranks import Ranks
    from mlx_overlay_server.engine.restoring import Restoring

logger = logging.getLogger("mlx_overlay_server")

IDLE_SECONDS = 0.1
"""Seconds that other ranks wait at most for rank 0 when nothing happens."""

POOL_SECONDS = 2.0
"""Seconds without work after which MLX's pool of freed buffers is given back to the system.

Between the requests of one client it is worth keeping: the next one needs buffers of the same sizes.
"""

DISK_POLL_SECONDS = 0.25
"""Seconds between two looks at whether a disk that is read has stopped answering."""

DISK_SECONDS = 2.0
"""Seconds that are left, when the engine stops, to write kept KV caches that are not on disk yet."""

GROWTH_STEPS = 64
"""Steps between two looks at whether running sequences have grown into the memory of kept KV caches."""


class Handle(Reports, Protocol):
    """Where commands come from and results go. Its methods may be called from the engine's thread."""

    options: EngineOptions
    read_tokenizer: ReadTokenizer | None

    def take(self, seconds: float) -> list[Command]: ...
    def wake(self) -> None: ...
    def post(self, items: list[tuple[int, Item]], stats: Stats) -> None: ...
    def end(self, reason: str) -> None: ...
    def finish(self) -> None: ...


class Worker:
    """The loop of the engine's thread, on every rank."""

    def __init__(self, engine: Handle, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives monotonic seconds."""
        self._engine = engine
        self._options = engine.options
        self._clock = clock
        self._commands: deque[Command] = deque()
        """Commands that were taken and not carried out yet."""
        self._runners: dict[str, AnyRunner] = {}
        self._incoming = Incoming(engine)
        self._owner: dict[int, str] = {}
        """Each sequence's id -> the key of its model."""
        self._steps = self._failures = 0
        self._looked_at = 0
        """The step at which the memory of running sequences was looked at last."""
        self._last_failure: str | None = None
        self._outbox = Outbox()
        self._worked_at: float | None = None
        """When there was work last; None when MLX's pool is empty since."""
        self._memory: Shares
        self._held: int
        """Bytes that weights and KV caches may take together."""
        self._admission: Admission
        self._ranks: Ranks
        self._prefixes: PrefixCache
        self._restoring: Restoring | None = None
        """The sequences that wait for KV caches from disk; None where none is kept there."""
        self._has_disk_news = False

    def run(self) -> None:
        """Run until Stop, or until nothing can go on, and say so to the handle."""
        try:
            self._prepare()
            with self._memory_limited():
                self._run()
                self._prefixes.spill()
                self._release()
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            reason = f"{type(error).__name__}: {first_line(error)}"
            logger.error("the engine has failed: %s", reason)
            self._engine.end(reason)
        self._runners.clear()
        self._incoming.clear()
        self._engine.finish()
        if self._restoring is not None:
            self._restoring.tier.close(DISK_SECONDS)

    def _prepare(self) -> None:
        """Import MLX and mlx-lm, which the first load would have to wait for, and set MLX's limits."""
        with left_out(*(UNUSED if self._engine.read_tokenizer is not None else ())):
            from mlx_overlay_server.engine import mlx  # before anything else imports mlx-lm

            # isort: split
            import mlx_overlay_server.engine.loading  # noqa: F401
        from mlx_overlay_server.engine.prefix_cache import PrefixCache
        from mlx_overlay_server.engine.ranks import Ranks

        machine = mlx.machine()
        if machine.is_metal:  # elsewhere nothing can be wired, and the pool is small, or on a card that nobody shares
            if not self._options.no_wired_memory:
                mlx.wire(machine.usable)
            mlx.limit_pool(shares(machine).pool)
        self._ranks = Ranks()
        kept = self._ranks.least(shares(machine, prefixes=self._options.cache_bytes).prefixes)
        self._memory = shares(machine, prefixes=kept)
        # Ranks hold different parts of a model, and would not decide alike.
        self._held = self._memory.held if self._ranks.group is None else 1 << 62
        self._admission = Admission(self._held, self._options.batch_size)
        self._prefixes = PrefixCache(kept)
        self._prefixes.bound(lambda: self._held - self._others())
        if self._options.kv_disk and self._ranks.group is None:  # the disks of ranks do not hold the same
            self._open_disk(kept)
        self._publish([])

    def _memory_limited(self) -> AbstractContextManager[None]:
        from mlx_overlay_server.engine import mlx

        return mlx.limited(self._memory.usable - self._memory.pool)

    def _open_disk(self, budget: int) -> None:
        from mlx_overlay_server.engine.disk.tier import Tier, folder
        from mlx_overlay_server.engine.restoring import Restoring

        self._prefixes.disk = Tier(folder(), self._options.kv_disk, budget, self._note_disk)
        self._restoring = Restoring(self._prefixes.disk, self._prefixes)

    def _note_disk(self) -> None:
        """Note that something was read from disk, or written. Other threads call this."""
        self._has_disk_news = True
        self._engine.wake()

    def _run(self) -> None:
        """Take turns. An error that no model is to blame for ends every sequence, and nothing else."""
        goes_on = True
        while goes_on:
            try:
                goes_on = self._turn()
            except Exception as error:
                if self._ranks.group is not None:  # ranks that no longer do the same cannot go on
                    raise
                self._reset(error)

    def _turn(self) -> bool:
        commands = self._ranks.share(self._engine.take(self._seconds()))
        self._commands.extend(commands)
        while self._commands:  # one by one: after an error the rest is still there
            command = self._commands.popleft()
            if isinstance(command, Stop):
                return False
            self._apply(command)
        self._admit()
        for key in self._incoming:
            if self._may_load(key):
                self._go_on_loading(key)
        for key, runner in list(self._runners.items()):
            if runner.is_busy:
                self._step(key, runner)
        self._release()
        has_news, self._has_disk_news = self._has_disk_news, False
        if commands or self._outbox.is_due or has_news:
            self._publish(self._outbox.items)
            self._outbox.sent(sum(runner.generating for runner in self._runners.values()))
        return True

    def _seconds(self) -> float:
        """Return how many seconds the next turn may wait for commands. Empties MLX's pool when that is due."""
        has_waiting = bool(self._commands or self._incoming or self._admission.waiting)
        if has_waiting or any(runner.is_busy for runner in self._runners.values()):
            self._worked_at = self._clock()
            return 0
        if self._restoring:
            return 0 if self._restoring.is_copying else DISK_POLL_SECONDS
        longest = IDLE_SECONDS if self._ranks.group is not None else 3600
        if self._worked_at is None:
            return longest
        left = self._worked_at + POOL_SECONDS - self._clock()
        if left > 0:
            return min(left, longest)
        from mlx_overlay_server.engine import mlx

        self._worked_at = None
        mlx.clear_pool()
        return longest

    def _apply(self, command: Command) -> None:
        if isinstance(command, Load):
            self._incoming.add(command.key, self._load(command), command.nbytes)
        elif isinstance(command, Unload):
            if self._incoming.drop(command.key):  # nobody waits for it any more
                self._clear_memory()
            if (runner := self._runners.pop(command.key, None)) is not None:
                ids = self._forget(command.key)
                self._outbox.add((id_, Unavailable("the model was unloaded")) for id_ in ids)
                runner.close()
                del runner
                self._clear_memory()
        elif isinstance(command, (Submit, Encode)):
            runner = self._runners.get(command.key)
            if runner is None:
                self._outbox.add([(command.id, Unavailable("the model was unloaded; try again"))])
                return
            self._submit(command, runner)
        elif isinstance(command, Cancel) and (key := self._owner.get(command.id)) is not None:
            self._outbox.forget([command.id])
            if self._restoring is not None:
                self._restoring.drop(command.id)
            self._runners[key].cancel(command.id)  # first: what is kept of it is copied while it is there
            self._admission.drop(command.id)
            del self._owner[command.id]

    def _admit(self) -> None:
        """Let sequences begin for which there is memory. Kept KV caches go before anybody waits or runs out of it."""
        for restored in self._restoring.step() if self._restoring else ():
            self._wait(restored)
        is_due = self._steps - self._looked_at >= GROWTH_STEPS and self._admission.has_begun
        if is_due or self._admission.waiting:
            self._admission.limit = self._reach()
        if is_due:
            self._looked_at = self._steps
            self._pause()
        while self._admission.waiting:
            missing = self._admission.missing(self._taken())
            if 0 < missing <= self._prefixes.kept:
                self._prefixes.free(missing)
            if self._refuse_first():
                continue
            submit = self._admission.next(self._taken())
            if submit is None:
                return
            try:
                self._runners[submit.key].add(submit)
                self._outbox.expect(submit.id)
            except Exception as error:
                if is_late(error):
                    raise
                self._owner.pop(submit.id)  # one request's trouble is not the others'
                self._admission.drop(submit.id)
                self._outbox.add([(submit.id, failure(error))])

    def _release(self) -> None:
        """Have written what was kept in this turn: no error of the GPU can come to light any more that spoils it."""
        disk = self._prefixes.disk
        if disk is not None and disk.has_staged:
            from mlx_overlay_server.engine import mlx

            mlx.settle()
            disk.release()

    def _submit(self, command: Submit | Encode, runner: AnyRunner) -> None:
        """Let a sequence wait for memory; refuse one whose prompt never fits beside the weights that are there."""
        if isinstance(command, Encode):
            self._owner[command.id] = command.key
            self._wait(command)
            return
        fits = runner.loaded.kv.tokens(self._held - self._weights - runner.images(command).kept)
        room = 1 << 62 if fits is None else fits - GROWTH
        size = len(command.prompt)
        if size >= room:
            most = max(0, room - 1)
            message = f"prompt is too long: {size} tokens > {most} maximum, which memory has room for beside the models"
            self._outbox.add([(command.id, PromptTooLong(message))])
            return
        self._owner[command.id] = command.key
        submit = replace(command, max_tokens=min(command.max_tokens, room - size))
        if self._restoring is None or not self._restoring.add(submit):
            self._wait(submit)

    def _wait(self, command: Submit | Encode) -> None:
        """Let a sequence wait for memory."""
        runner = self._runners[command.key]
        self._admission.add(
            command, runner.loaded.kv, images=runner.images(command), is_alone=runner.runs_alone(command)
        )

    def _refuse_first(self) -> bool:
        """Refuse the first sequence that waits where other programs leave no memory for it, and none of ours will."""
        is_short = self._admission.limit < self._held and self._admission.missing(self._taken()) > 0
        if not is_short or self._admission.has_begun or (refused := self._admission.refuse()) is None:
            return False
        self._owner.pop(refused.id)
        self._outbox.add([(refused.id, no_memory())])
        return True

    def _pause(self) -> None:
        """Where answers have outgrown the memory, take it from kept KV caches, then from sequences that began last."""
        taken = self._weights + self._incoming.begun_bytes + self._prefixes.nbytes
        if excess := self._admission.excess(taken):
            before = self._prefixes.nbytes
            self._prefixes.free(excess)
            taken -= before - self._prefixes.nbytes
        for id_ in self._admission.pauses():
            if not self._admission.excess(taken):
                return
            if self._runners[self._owner[id_]].pause(id_):
                self._admission.pause(id_)

    def _reach(self) -> int:
        """Return how many bytes weights and KV caches may take now, with what other programs leave."""
        from mlx_overlay_server.engine import mlx

        reach = mlx.reach() if self._ranks.group is None else None
        return self._held if reach is None else min(self._held, reach - int(self._memory.usable * SPARE))

    @property
    def _weights(self) -> int:
        """Bytes of the weights of the models that are there."""
        return sum(runner.loaded.nbytes for runner in self._runners.values())

    def _others(self) -> int:
        """Return the bytes of all that is not a kept KV cache."""
        return self._weights + self._incoming.nbytes + self._admission.running_bytes

    def _taken(self) -> int:
        """Return the bytes of weights, those that are coming included, and of kept KV caches."""
        return self._weights + self._incoming.nbytes + self._prefixes.nbytes

    def _may_load(self, key: str) -> bool:
        """Return whether a load may go on. It waits until sequences leave it memory; meanwhile none begins in that."""
        if not self._incoming.has_begun(key):
            if excess := self._admission.excess(self._taken()):
                self._prefixes.free(excess)
            if self._admission.has_begun and self._admission.excess(self._taken()):
                return False
            self._incoming.begin(key)
        return True

    def _load(self, command: Load) -> Iterator[AnyRunner | int | None]:
        if command.task != "text":
            from mlx_overlay_server.engine.encoding import loading

            return loading.load(command, self._options, self._ranks.group, self._memory)
        from mlx_overlay_server.engine.loading import load

        read = self._engine.read_tokenizer
        options = command.tuning.applied(self._options)
        return load(command, options, self._ranks.group, self._prefixes, self._memory, read)

    def _go_on_loading(self, key: str) -> None:
        """Load one slice of a model; sequences of other models go on between slices."""
        try:
            made = self._incoming.step(key)
        except (Exception, SystemExit) as error:  # loading runs the model's code; some of mlx-lm's calls sys.exit
            if is_late(error):
                raise
            self._incoming.fail(key, error)
            self._clear_memory()
            return
        if made is not None:
            self._runners[key] = made
            garbage.keep()
            self._engine.settle(key, made.loaded)

    def _step(self, key: str, runner: AnyRunner) -> None:
        self._steps += 1
        try:
            made = runner.step()
        except Exception as error:
            if is_late(error):
                raise
            # A batch that failed is lost; the model and the others are not.
            self._note(error, f"in a batch of {key.partition(':')[2]}")
            made = [(id_, failure(error)) for id_ in self._forget(key)]
            runner.reset()
            self._prefixes.drop(key)  # one of them may be among what was not computed
            self._clear_memory()
        for id_, item in made:
            if is_last(item):
                self._owner.pop(id_, None)
                self._admission.drop(id_)
            elif isinstance(item, Sampled):
                self._admission.grow(id_)
        self._outbox.add(made)

    def _reset(self, error: Exception) -> None:
        """End every sequence that has begun; after a late error of the GPU also loads, and what came of either."""
        from mlx_overlay_server.engine import mlx

        self._note(error, "in the engine")
        items: list[tuple[int, Item]] = self._outbox.items
        self._outbox.reset()
        for id_ in self._admission.clear():
            del self._owner[id_]
            items.append((id_, failure(error)))
        for runner in self._runners.values():
            runner.reset()
        if is_late(error):
            for key in self._incoming:
                self._incoming.fail(key, error)
            for key in self._runners:
                self._prefixes.drop(key)
            mlx.drain()
            self._clear_memory()
        self._publish(items)

    def _note(self, error: Exception, where: str) -> None:
        """Count an error, for the log and for /health."""
        self._failures += 1
        self._last_failure = f"{type(error).__name__} {where}"
        logger.error("%s: %s", self._last_failure, first_line(error))

    def _forget(self, key: str) -> list[int]:
        """Forget the sequences of a model, and return their ids."""
        ids = [id_ for id_, owner in self._owner.items() if owner == key]
        for id_ in ids:
            del self._owner[id_]
            self._admission.drop(id_)
            if self._restoring is not None:
                self._restoring.drop(id_)
        self._outbox.forget(ids)
        return ids

    def _publish(self, items: list[tuple[int, Item]]) -> None:
        runners = self._runners.values()
        stats = Stats(
            active=sum(runner.active for runner in runners),
            waiting=sum(runner.waiting for runner in runners) + self._admission.waiting,
            cache_bytes=self._prefixes.nbytes,
            cache_entries=len(self._prefixes),
            running_bytes=self._admission.running_bytes,
            steps=self._steps,
            failures=self._failures,
            is_alive=True,
            last_failure=self._last_failure,
            disk=self._prefixes.disk.stats if self._prefixes.disk is not None else DiskStats(),
            memory=self._memory,
        )
        self._engine.post(items, stats)

    @staticmethod
    def _clear_memory() -> None:
        from mlx_overlay_server.engine import mlx

        garbage.collect()
        mlx.clear_pool()
