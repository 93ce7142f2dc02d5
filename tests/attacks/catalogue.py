"""The table of attacks: what each is called, what stopping it means, and what harmless thing must work beside it.

The first 50 are those of the project's study of sandboxes; the others are our own. Runs inside the sandbox too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from worker import canary

from . import files, kernel, network, processes, resources, twins
from .calls import Decoys

__all__ = ["ATTACKS", "SPEECHES", "STUDIED", "Attack", "Speech"]

STUDIED = 50


@dataclass(frozen=True)
class Attack:
    """One attack by code inside. meaning: what stops it. twin works in both tiers, twin_script in the base tier alone.

    alone: it may end its worker, so it gets one of its own, and a death by one of these signals is "blocked" too.
    free: without any sandbox it gets through on every kernel, which shows that it is a real attack.
    group: in the base tier only a control group stops it, which is why scripts run at CONTAINED alone.
    """

    name: str
    run: Callable[[Decoys], str]
    meaning: str
    twin: Callable[[Decoys], None]
    twin_script: Callable[[Decoys], None] | None = None
    alone: tuple[int, ...] | None = None
    free: bool = False
    group: bool = False


@dataclass(frozen=True)
class Speech:
    """One lie of a worker to the daemon. expected: the code of the error that ends its job.

    words: the key of tests/attacks/speeches.py. A true step said before it must be heard, which is the twin.
    """

    name: str
    words: str
    meaning: str
    expected: str


SIGSYS, SIGKILL = 31, 9
A = Attack

_FILES = (
    A("read /etc/shadow", files.read_shadow, "no such file inside", twins.read_library),
    A("read an SSH key in the home", files.read_ssh_key, "no such file inside", twins.read_input, free=True),
    A("read the ledger or key of the daemon", files.read_ledger, "no such file inside", twins.read_input, free=True),
    A("list the host's folders", files.list_folders, "an empty root of its own", twins.list_library, free=True),
    A("write outside the scratch folder", files.write_outside, "all else is read-only or absent", twins.print_log,
      twins.scratch_file, free=True),
    A("fill /dev/shm, /dev, /tmp and /", files.fill_shared_memory, "sized and read-only", twins.print_log,
      twins.scratch_file, free=True),
    A("fill the disk through the scratch folder", files.fill_scratch, "16 MiB, then no space", twins.print_log,
      twins.scratch_file),
)  # fmt: skip
_NETWORK = (
    A("connect to a TCP port of the host", canary.connect_tcp, "no socket can be made", twins.wake, free=True),
    A("send UDP to the host", canary.send_udp, "no socket can be made", twins.wake, free=True),
    A("connect to an abstract Unix socket", canary.connect_abstract, "no socket can be made", twins.wake, free=True),
    A("connect to a Unix socket by path", canary.connect_path, "no socket can be made", twins.wake, free=True),
    A("listen on a TCP port", network.listen_tcp, "no socket can be made", twins.wake, free=True),
    A("netlink, packet, vsock, cipher and TIPC sockets", network.odd_sockets, "no socket can be made", twins.wake,
      free=True),
)  # fmt: skip
_BOMBS = (
    A("fork bomb of 200 processes", canary.fork_bomb, "no process (graph), a few dozen (script)", twins.thread,
      twins.child, alone=(SIGKILL,), free=True),
    A("memory bomb in one process", resources.memory_bomb, "the cap of the job", twins.take_memory, alone=(SIGKILL,),
      free=True),
    A("memory bomb over several processes", canary.memory_bomb_in_parts,
      "no process (graph), one cap for all (script)", twins.take_memory, twins.child, alone=(SIGKILL,), free=True,
      group=True),
    A("memory bomb of anonymous files", resources.memfd_bomb, "memfd_create is refused", twins.take_memory,
      alone=(SIGKILL,), free=True),
    A("System V shared memory, queues, semaphores", kernel.hidden_memory, "the calls are refused", twins.map_memory,
      free=True),
)  # fmt: skip
_OTHERS = (
    A("ptrace the daemon or another worker", processes.ptrace, "the call is refused", twins.signal_itself),
    A("process_vm_readv of the daemon", processes.read_memory, "the call is refused", twins.read_input),
    A("signal the daemon or another worker", processes.signal_daemon, "they have no number inside",
      twins.signal_itself, free=True),
    A("signal the parent", processes.signal_parent, "its parent is its own namespace's first", twins.signal_itself,
      free=True),
    A("take a descriptor with pidfd_getfd", processes.steal_descriptor, "pidfd_open is refused", twins.ask_flags),
    A("read /proc/PID/environ of the daemon", processes.read_environ, "there is no /proc", twins.read_library),
    A("see other processes in /proc", processes.list_processes, "there is no /proc", twins.list_library, free=True),
    A("walk into /proc/PID/root of the daemon", processes.walk_root, "there is no /proc", twins.list_library),
)  # fmt: skip
_KERNEL = (
    A("write over code through /proc/self/mem", kernel.write_own_code, "there is no /proc", twins.map_memory),
    A("mount a tmpfs", kernel.mount_tmpfs, "the call is refused", twins.print_log, twins.scratch_file),
    A("new user, mount or network namespace", kernel.user_namespace, "the call is refused", twins.thread, twins.child),
    A("user namespace through clone3", kernel.clone3_namespace, "clone3 answers ENOSYS", twins.thread, twins.child),
    A("setns, open_tree, fsopen, move_mount", kernel.new_mount_calls, "the calls are refused", twins.list_library),
    A("keyrings of the session", kernel.keyrings, "the calls are refused", twins.draw_random),
    A("io_uring", kernel.io_uring, "the call is refused", twins.wake),
    A("bpf", kernel.bpf, "the call is refused", twins.wake),
    A("perf_event_open", kernel.perf, "the call is refused", twins.ask_time),
    A("userfaultfd", kernel.userfaultfd, "the call is refused", twins.map_memory),
    A("personality: no address randomisation", kernel.personality, "the call is refused", twins.name_itself, free=True),
    A("calls by the x32 or 32-bit numbers", kernel.foreign_abi, "the process is killed", twins.name_itself,
      alone=(SIGSYS,)),
    A("type into your terminal (TIOCSTI, TIOCLINUX)", processes.type_into_terminal,
      "no terminal, and the ioctl refused", twins.ask_terminal),
    A("set-user-id programs and capabilities", kernel.gain_privileges, "no capability, no_new_privs", twins.ask_users),
    A("a grandchild that outlives the job", processes.leave_grandchild, "it dies with its namespace", twins.thread,
      twins.child, alone=()),
)  # fmt: skip
_PROCESS = (
    A("core dump to the host", files.core_dump, "size 0, for ever", twins.ask_limits),
    A("use descriptors of the daemon", processes.inherited_descriptors, "none but its own is open", twins.read_input),
    A("run another program of the machine", processes.run_program, "no other program inside", twins.read_library,
      twins.program, alone=(), free=True),
)  # fmt: skip

SPEECHES = (
    Speech("an endless loop", "endless", "killed at the deadline", "deadline"),
    Speech("flood of the log, 40 MB", "flood", "killed at 16 MiB, 64 KiB kept", "log-flood"),
    Speech("reply of 4 GB length", "giant", "refused by its length alone", "oversize-frame"),
    Speech("reply malformed or nested 30,000 deep", "deep", "refused unread", "bad-frame"),
    Speech("silence, then exit", "silence", "the job fails", "no-reply"),
    Speech("silence for ever", "never", "killed at the deadline", "deadline"),
    # --- our own ---
    Speech("replies out of order", "disorder", "the job fails", "wrong-reply"),
    Speech("a loss that is no number", "nan", "the job fails", "wrong-reply"),
    Speech("a checkpoint larger than agreed", "oversize", "refused before a byte of it", "oversize-checkpoint"),
    Speech("a checkpoint that breaks off", "short", "the job fails, nothing is left", "short-checkpoint"),
    Speech("words after the end of the job", "after", "the job fails", "extra-bytes"),
    Speech("closed replies, and it runs on", "closed", "killed, and the job fails", "no-reply"),
    Speech("a checkpoint with a tensor named twice", "twice", "refused when it is read", "malformed"),
    Speech("escape sequences for your terminal in the log", "escape", "shown as harmless signs", "bad-data"),
)

_OWN = (
    A("the list of users", files.read_passwd, "no such file inside", twins.ask_users, free=True),
    A("links out of the scratch folder", files.link_out, "they lead nowhere", twins.read_library, twins.scratch_link),
    A("device nodes and raw disks", files.device_nodes, "none, and no way to make one", twins.read_library),
    A("change what the next worker loads", files.poison_code, "read-only inside", twins.read_library,
      twins.scratch_file),
    A("change modes, owners and attributes of code", files.change_mode_or_owner, "read-only inside",
      twins.read_library),
    A("change, lock or truncate the inputs it was lent", files.change_inputs, "lent read-only", twins.read_input),
    A("open files by inode number", files.open_by_handle, "the calls are refused", twins.read_library),
    A("inotify and fanotify queues", files.watch_files, "the calls are refused", twins.wake, free=True),
    A("hand the daemon a descriptor", network.pass_descriptor, "its socket is for reading alone", twins.ask_flags),
    A("write into the daemon's memory", processes.write_memory, "the calls are refused", twins.take_memory),
    A("read other workers' descriptors", processes.walk_descriptors, "there is no /proc", twins.list_library),
    A("kcmp, migrate_pages, prlimit, affinity, nice of others", processes.compare_and_advise,
      "they have no number inside", twins.keep_affinity, free=True),
    A("secrets in its own environment", processes.own_environ, "six harmless variables", twins.ask_users),
    A("run a program from memory", processes.run_from_memory, "memfd_create and execveat are refused", twins.map_memory,
      twins.program, alone=()),
    A("user namespace through clone", kernel.clone_namespace, "the flag is refused", twins.thread, twins.child),
    A("remount or uncover what lies beneath", kernel.remount, "the calls are refused", twins.read_library),
    A("chroot and pivot_root", kernel.change_root, "the calls are refused", twins.list_library),
    A("POSIX message queues", kernel.posix_queue, "the call is refused", twins.wake),
    A("set the clock", kernel.set_clock, "the calls are refused", twins.ask_time),
    A("rename the host", kernel.rename_host, "the call is refused", twins.ask_users),
    A("swap, reboot, modules, accounting, quotas", kernel.stop_machine, "the calls are refused", twins.ask_time),
    A("kernel log, symbols and version", kernel.read_kernel_log, "the call refused, no /proc", twins.draw_random),
    A("port input and output, segment tables", kernel.port_io, "the calls are refused", twins.map_memory),
    A("a filter of its own that undoes ours", kernel.loosen_filter, "a filter only ever takes away", twins.name_itself),
    A("system calls from machine code of its own", kernel.executable_stack, "they meet the same filter",
      twins.map_memory, free=True),
    A("memory that RLIMIT_DATA does not count", resources.uncounted_memory,
      "no such mapping (graph), one cap for all (script)", twins.take_memory, alone=(SIGKILL,), free=True, group=True),
    A("reserve 64 TiB of addresses", resources.reserve_addresses, "the cap on addresses", twins.map_memory, free=True),
    A("lock memory", resources.lock_memory, "the call is refused", twins.take_memory),
    A("a thousand threads", resources.thread_bomb, "the cap on tasks", twins.thread, alone=(), free=True),
    A("five thousand descriptors", resources.descriptor_bomb, "256", twins.ask_flags),
    A("large pipe buffers", resources.grow_pipes, "the command is refused", twins.ask_flags, free=True),
    A("raise its own limits", resources.raise_limits, "hard limits never rise", twins.ask_limits),
    A("real-time or better priority", resources.take_priority, "the calls are refused", twins.ask_priority),
    A("kernel timers and signal queues", resources.timers_and_queues, "the calls are refused", twins.ask_time,
      free=True),
    A("splice pages of its inputs (Dirty Pipe)", resources.splice_pages, "the calls are refused", twins.read_input),
)  # fmt: skip

ATTACKS = (*_FILES, *_NETWORK, *_BOMBS, *_OTHERS, *_KERNEL, *_PROCESS, *_OWN)
assert len(ATTACKS) - len(_OWN) + 6 == STUDIED, "the study's attacks: those of code inside, and six on the daemon"
