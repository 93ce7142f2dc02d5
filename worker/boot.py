"""The first and only program inside the sandbox: confines itself further, warms torch, takes one job, ends.

Order is everything. Trusted code runs first: limits, Landlock, the base filter, torch and one warm-up step. Then
the request arrives with its descriptors, unread; then the graph filter closes; only then are a stranger's bytes
parsed. What it says goes through one pipe as frames (worker/frames.py). One job per process, never two.
"""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import resource
import select
import socket
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # `python -I -S boot.py CONFIG`: no site packages, no current folder, until we say so
    _config: dict[str, Any] = json.loads(sys.argv[1])
    sys.path[:0] = [_config["code"], *_config["libraries"]]
    # Landlock hides the folder above our packages, so the packages themselves are found now.
    import protocol  # noqa: F401
    import worker  # noqa: F401

from protocol import params, tape
from protocol.codec import decode
from protocol.errors import IchibaError
from protocol.payload import PayloadKey
from protocol.task import TaskSpec
from worker import canary, frames, landlock, script, seccomp, stage_frames

if TYPE_CHECKING:
    from protocol.program import Program
    from worker.crossings import Wire
    from worker.training import SegmentResult


class _Mouth:
    """The pipe of replies. Writes block while the daemon is slow: memory here stays bounded."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def say(self, reply: frames.Reply) -> None:
        self.write(memoryview(frames.frame(reply)))

    def write(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self.descriptor, data) :]

    def say_with(self, reply: frames.Reply, raw: memoryview) -> None:
        """A frame and the raw bytes after it, in one call if the pipe takes them."""
        head = memoryview(frames.frame(reply))
        done = os.writev(self.descriptor, [head, raw])
        self.write(head[done:])
        self.write(raw[max(0, done - len(head)) :])


class _Ear:
    """Listens for frames.SUSPEND between steps: one poll of some microseconds, all that the graph filter allows."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def asked(self) -> bool:
        """Whether to stop now. Ends the process if the daemon has gone: nobody would hear its answer."""
        if not self._poll.poll(0):
            return False
        if os.read(self.descriptor, 1) != frames.SUSPEND:
            raise SystemExit("the daemon has gone")
        return True

    def read(self, size: int) -> memoryview:
        """Exactly `size` bytes, when they are there, in memory of their own. Ends the process if the daemon goes."""
        import numpy as np

        left = held = np.empty(size, np.uint8).data
        while left:
            done = os.readv(self.descriptor, [left])
            if not done:
                raise SystemExit("the daemon has gone")
            left = left[done:]
        return held


class _LiveWire:
    """A unit's neighbours, by way of the daemon: asks for each payload and hands each over (worker/stage_frames.py)."""

    def __init__(self, mouth: _Mouth, ear: _Ear) -> None:
        self._mouth, self._ear = mouth, ear

    def begin(self, segment: int) -> None:
        """The daemon knows the segment by the steps."""

    def receive(self, key: PayloadKey) -> tuple[memoryview, memoryview]:
        self._mouth.say(stage_frames.Need(key))
        start = self._ear.read(5)
        head = bytes(start[1:]) + self._ear.read(int.from_bytes(start[1:], "little"))
        entry, _ = tape.read_head(head)
        if bytes(start[:1]) != stage_frames.FEED or entry.key != key:
            raise SystemExit(f"the daemon fed {entry.key} where {key} was asked for")
        return memoryview(head), self._ear.read(entry.size_bytes)

    def send(self, key: PayloadKey, payload: memoryview) -> None:
        self._mouth.say_with(stage_frames.Sent(key, len(payload)), payload)

    def end(self) -> None:
        """The daemon sees it by the Segment."""


class _Refused(Exception):
    """The job cannot be done; `code` says whose part of it is wrong."""

    def __init__(self, code: frames.WorkerCode, error: BaseException, unit: int = -1) -> None:
        self.code, self.error, self.unit = code, error, unit
        super().__init__(str(error))


def limit(name: str, value: int) -> None:
    """Lower one rlimit, soft and hard, never above what already holds."""
    which = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def confine(config: dict[str, Any]) -> int:
    """Limits, then Landlock, then (without namespaces) the base filter. The Landlock version; 0 for none."""
    for name, value in config["limits"].items():
        limit(name, value)
    version = 0
    if config["filters"]:
        try:
            version = landlock.restrict(
                readable=config["readable"], writable=config["writable"], devices=["/dev/null", "/dev/urandom"]
            )
        except landlock.LandlockUnavailable:
            if not config["namespaces"]:
                raise  # nothing else hides the owner's files
        if not config["namespaces"]:  # bubblewrap has installed it already otherwise
            seccomp.install(seccomp.filter_program(seccomp.Tier.BASE, only_pid=os.getpid()))
    return version


def warm_up() -> frames.Ready:
    """Load torch and all that it loads at a first step, while opening files is still allowed.

    One AdamW update written out, not torch.optim's: that one imports the compiler, which takes another second and
    wants a folder to write to, and no Program needs it.
    """
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        weight, moment, variance = torch.ones(3, 64, 64).unbind()
        gradient = (weight @ weight).relu_().sub_(weight).softmax(-1)
        moment = moment.lerp(gradient, 0.1)
        variance = variance.mul(0.999).addcmul(gradient, gradient, value=0.001)
        weight = weight.mul(0.99) - 0.001 * moment / (variance.sqrt() + 1e-8)
        (weight.double() @ weight.double()).to(torch.int64).sum()
    from worker import exact, stage_run, tracing, training  # noqa: F401
    from worker.exact import compiled

    exact.int8_is_faster()  # tried on this machine once: 50 ms to a second that no job should wait for
    exact.normal(0, 0, 0, (64, 64), draw=compiled.uniform)
    exact.kernels()
    # Tensors made and freed at once stay in the heap (worker/exact/memory.py), so the first step finds its pages.
    made = [torch.ones(1 << 20) for _ in range(params.SANDBOX_WARM_HEAP_BYTES >> 22)]
    del made
    gc.collect()
    gc.freeze()  # or reading a program makes the collector walk through all of torch: 75 ms

    return frames.Ready(str(torch.__version__), 0, torch.backends.cpu.get_cpu_capability())


def receive(descriptor: int) -> tuple[bytes, list[int]]:
    """The body of the request, unparsed, and the descriptors that came with it. Ends if the daemon has gone.

    The socket stays open, for reading alone: frames.SUSPEND may come through it (`_Ear`).
    """
    with socket.socket(fileno=descriptor) as ear:
        head, descriptors, flags, _ = socket.recv_fds(ear, 4, params.SANDBOX_ARRAYS_MAX + 6 + params.TAPES_MAX)
        if flags & socket.MSG_CTRUNC:
            raise SystemExit("descriptors were lost on the way: raise RLIMIT_NOFILE")
        body = bytearray()
        while len(head) < 4 or len(body) < int.from_bytes(head, "little"):
            missing = 4 - len(head) or int.from_bytes(head, "little") - len(body)
            part = ear.recv(min(missing, 1 << 20))
            if not part:
                raise SystemExit(0)
            if len(head) < 4:
                head += part
            else:
                body += part
            if len(head) == 4 and int.from_bytes(head, "little") > params.SANDBOX_REQUEST_BYTES_MAX:
                raise SystemExit("the request is too long")
        ear.shutdown(socket.SHUT_WR)  # the daemon reads nothing here: nothing can be left in its buffer either
        ear.detach()
    return bytes(body), descriptors


def view(descriptor: int) -> memoryview:
    """A read-only view of the whole file, uint8, mapped: no copy, and the kernel may drop its pages again."""
    size = os.fstat(descriptor).st_size
    mapped = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ)) if size else memoryview(b"")
    os.close(descriptor)
    return mapped


def work(job: frames.Work, descriptors: list[int], mouth: _Mouth, ear: _Ear) -> None:
    """Run one job and say its replies, all but the last. Raises _Refused, MemoryError."""
    import torch

    from protocol.program import Program
    from worker import checkpoint, training
    from worker.crossings import BadTape, TapeWire
    from worker.link_codecs import BadPayload

    limit("CPU", job.cpu_seconds)
    limit("DATA", job.memory_bytes)
    limit("AS", job.memory_bytes + job.input_bytes + params.SANDBOX_ADDRESS_SLACK_BYTES)
    torch.set_num_threads(job.threads)
    views = [view(descriptor) for descriptor in descriptors]
    try:
        loose = decode(TaskSpec, job.task, bytes_max=params.MESSAGE_BYTES_MAX)
        task = TaskSpec.from_bytes(job.task, network=loose.network)
    except IchibaError as error:
        raise _Refused("bad-task", error) from error
    try:
        program = Program.from_bytes(bytes(views[0]))
    except IchibaError as error:
        raise _Refused("bad-program", error) from error
    states = views[1 + len(job.arrays) :]
    tapes = [states.pop() for _ in range(job.tapes)][::-1]
    base = states[0] if job.has_base else None
    arrays = dict(zip(job.arrays, views[1 : 1 + len(job.arrays)], strict=True))
    try:
        if job.want == "answer":
            say_answer(job, task, program, arrays, states, mouth)
            return
        if job.want == "initial-root":
            mouth.say(frames.Root(training.initial_root(task, program, base)))
            return
        if job.want == "initial-state":
            state = training.initial_state(task, program, base)
            mouth.say(frames.Root(checkpoint.state_root(state)))
            say_state(checkpoint.dump(state), mouth)
            return
        if task.stage is not None:
            wire = TapeWire(job.first_segment, tapes) if tapes else _LiveWire(mouth, ear)
            say_unit(job, task, program, arrays, base, wire, mouth)
            return
        compare = states[-1] if job.has_claimed else None
        say_segments(job, task, program, arrays, base, compare, mouth, ear)
    except training.Suspended as stopped:
        mouth.say(
            frames.Suspended(
                segment=stopped.segment,
                step=stopped.step,
                in_root=stopped.in_root,
                checkpoint_bytes=len(stopped.state),
            )
        )
        mouth.write(memoryview(stopped.state))
    except IchibaError as error:
        code: frames.WorkerCode = "bad-data"
        if isinstance(error, BadPayload | BadTape):
            code = "bad-tape" if tapes else "bad-payload"
        raise _Refused(code, error, error.unit if isinstance(error, BadPayload) else -1) from error


def say_segments(
    job: frames.Work,
    task: TaskSpec,
    program: Program,
    arrays: dict[str, memoryview],
    base: memoryview | None,
    compare: memoryview | None,
    mouth: _Mouth,
    ear: _Ear,
) -> None:
    """Run segments of an ordinary task. Raises IchibaError, training.Suspended."""
    from worker import training

    at = job.partial
    partial = training.Partial(at.step, at.in_root, at.root) if at else None
    told = _Steps(mouth, partial.step if partial else task.steps_of(job.first_segment).start)
    for result in training.run_segments(
        task=task,
        program=program,
        arrays=arrays,
        base=base,
        segments=range(job.first_segment, job.last_segment),
        threads=job.threads,
        cheat=job.cheat,
        on_step=told.step,
        stop=ear.asked,
        partial=partial,
        ordered=training.Ordered(job.ordered.segment, job.ordered.fraud) if job.ordered else None,
        gauges=job.gauges,
        compare=compare,
    ):
        told.rest_of(result)
        say_segment(result, mouth)


def say_unit(
    job: frames.Work,
    task: TaskSpec,
    program: Program,
    arrays: dict[str, memoryview],
    base: memoryview | None,
    wire: Wire,
    mouth: _Mouth,
) -> None:
    """Run segments of a unit of a parallel job. Raises IchibaError."""
    from worker import stage_run, training

    told = _Steps(mouth, task.steps_of(job.first_segment).start)
    for result in stage_run.run_unit(
        task=task,
        program=program,
        arrays=arrays,
        base=base,
        segments=range(job.first_segment, job.last_segment),
        wire=wire,
        threads=job.threads,
        cheat=job.cheat,
        on_step=told.step,
        ordered=training.Ordered(job.ordered.segment, job.ordered.fraud) if job.ordered else None,
    ):
        say_segment(result, mouth)


def say_answer(
    job: frames.Work,
    task: TaskSpec,
    program: Program,
    arrays: dict[str, memoryview],
    states: list[memoryview],
    mouth: _Mouth,
) -> None:
    """Answer a question of a dispute. states: the descriptors after the arrays.

    Raises IchibaError for a question that does not fit the task or the states.
    """
    from worker.tracing import inspect

    followed = [states.pop() for _ in range(job.follows)][::-1]
    body, opening, state = inspect(
        job.question,
        task=task,
        program=program,
        arrays=arrays,
        base=states[0] if job.has_base else None,
        claimed=states[-1] if job.has_claimed else None,
        threads=job.threads,
        gauges=job.gauges,
        followed=followed,
        dissent=job.dissent,
    )
    mouth.say(frames.Answered(body=body, opening_bytes=len(opening)))
    mouth.write(memoryview(opening))
    if state is not None:
        say_state(state, mouth)


def say_state(state: bytes, mouth: _Mouth) -> None:
    """Hand a state over, as safetensors."""
    mouth.say(frames.Handed(len(state)))
    mouth.write(memoryview(state))


class _Steps:
    """Says each step once and in order, as it is done. A demonstrated fraud leaves steps out: then with its lie."""

    def __init__(self, mouth: _Mouth, due: int) -> None:
        self.mouth, self.due = mouth, due

    def step(self, step: int, loss: float) -> None:
        if step == self.due:
            self.mouth.say(frames.Step(step, loss if math.isfinite(loss) else None))
            self.due += 1

    def rest_of(self, result: SegmentResult) -> None:
        for step in range(self.due, result.last_step):
            self.step(step, result.losses[step - result.last_step])  # from the end: a resumed one lacks the first


def say_segment(result: SegmentResult, mouth: _Mouth) -> None:
    """The frame of a segment, then its checkpoint's bytes; before it those of its false end, if one was ordered."""
    if result.false_end is not None:
        false = result.false_end
        mouth.say(frames.FalseEnd(result.segment, false.root, len(false.checkpoint)))
        mouth.write(memoryview(false.checkpoint))
    mouth.say(
        frames.Segment(
            segment=result.segment,
            first_step=result.first_step,
            last_step=result.last_step,
            in_root=result.in_root,
            out_root=result.out_root,
            operations=result.operations,
            checkpoint_bytes=len(result.checkpoint),
            diverged_step=result.diverged_step,
            distance=result.distance,
        )
    )
    mouth.write(memoryview(result.checkpoint))


def serve(request: frames.Request, descriptors: list[int], mouth: _Mouth, ear: _Ear) -> Iterator[frames.Reply]:
    """The last replies of a request: work says its own on the way, because they carry raw bytes."""
    if isinstance(request, frames.Rehearsal):
        own = {"replies": mouth.descriptor, "job": ear.descriptor}
        yield from canary.rehearse(request.attempts, request.decoys | own)
        yield frames.Done()
        return
    if isinstance(request, frames.Script):
        limit("CPU", request.seconds * (os.cpu_count() or 1) + 10)
        limit("DATA", request.memory_bytes)
        yield script.run(request)
        script.hand_over(request.outputs_bytes_max, mouth.say, mouth.write)
        yield frames.Done()
        return
    try:
        work(request, descriptors, mouth, ear)
    except _Refused as refused:
        yield _failed(refused.code, refused.error, refused.unit)
    except MemoryError as error:
        yield _failed("out-of-memory", error)
    else:
        yield frames.Done()


def _failed(code: frames.WorkerCode, error: BaseException, unit: int = -1) -> frames.Failed:
    what = error.what if isinstance(error, IchibaError) else str(error) or type(error).__name__
    why = error.why if isinstance(error, IchibaError) else ""
    most = params.SANDBOX_TEXT_CHARS_MAX
    return frames.Failed(code, what[:most], why[:most], unit)


def main(config: dict[str, Any]) -> None:
    """Become the worker of `config` (worker/cage.py writes it)."""
    mouth = _Mouth(config["replies"])

    def last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An unforeseen error: torch raises what it likes. Told, printed, and the process ends."""
        text = f"{kind.__name__}: {error}"
        starved = issubclass(kind, MemoryError) or "can't allocate memory" in text or "not enough memory" in text
        sys.__excepthook__(kind, error, trace)
        sys.stderr.flush()
        code: frames.WorkerCode = "out-of-memory" if starved else "internal"
        mouth.say(frames.Failed(code, text[: params.SANDBOX_TEXT_CHARS_MAX], "see the last lines of the log"))
        os._exit(1)

    sys.excepthook = last_words
    version = confine(config)
    warm = warm_up() if config["torch"] else frames.Ready("", 0, "")
    mouth.say(frames.Ready(warm.torch, version, warm.instructions))
    body, descriptors = receive(config["job"])
    if config["tier"] == seccomp.Tier.GRAPH.value:
        seccomp.install(
            seccomp.filter_program(seccomp.Tier.GRAPH, only_pid=None if config["namespaces"] else os.getpid())
        )
    for reply in serve(frames.read_request(body), descriptors, mouth, _Ear(config["job"])):
        mouth.say(reply)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no interpreter shutdown: torch's takes 100 ms and nothing is left to save


if __name__ == "__main__":
    main(_config)
