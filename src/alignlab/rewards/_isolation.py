"""What a process takes away from itself, for good, before it runs a foreign program: limits, a filter of system calls
(seccomp), and files (Landlock).

The filter leaves only what computing in memory needs: no sockets, no processes, no signals to others, nothing written.
Standard library only: `_sandboxed` loads it by its path, in a process that knows nothing of alignlab.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Collection, Iterable

# name: number on x86_64, number on aarch64 (None: it does not exist there)
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "close": (3, 57),
    "lseek": (8, 62), "fstat": (5, 80), "newfstatat": (262, 79), "stat": (4, None), "lstat": (6, None),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "getdents64": (217, 61), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "futex": (202, 98), "set_robust_list": (273, 99),
    "rseq": (334, 293), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "membarrier": (324, 283),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getrusage": (98, 165), "getrandom": (318, 278), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "uname": (63, 160), "sysinfo": (99, 179), "exit": (60, 93), "exit_group": (231, 94),
    "set_tid_address": (218, 96),
}  # fmt: skip
OF_THE_JUDGE: dict[str, tuple[int | None, int | None]] = {
    "wait4": (61, 260), "kill": (62, 129), "setitimer": (38, 103),
}  # fmt: skip
"""To end the program's process when it is time, and to see it gone."""
OPEN, OPENAT, CLONE, CLONE3, FCNTL, IOCTL = (2, None), (257, 56), (56, 220), (435, 435), (72, 25), (16, 29)
NATIVE = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of the tables, AUDIT_ARCH."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
THREAD = 0x10000  # CLONE_THREAD
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # duplicate, descriptor flags, status flags; none that sends signals
IOCTL_COMMANDS = (0x5401, 0x541B, 0x5450, 0x5451)  # is it a terminal, how much is there, close on exec
ALLOW, DENY, ABSENT, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
LANDLOCK_READ = 0b1101  # execute, read files, read directories
LANDLOCK_FILE = 0b0101


def limit(seconds: float, memory_mb: int) -> None:
    """Processor time, address space, and no file that grows."""
    whole, memory = int(seconds) + 2, memory_mb << 20
    for what, most in (
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def isolate(*, judge: bool) -> None:
    """Takes away everything that `ALLOWED` does not name. Cannot be undone, nor evaded by native code.

    Raises:
        OSError: this kernel or machine has no seccomp; nothing foreign may then be run.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if not judge:
        libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: it ends with whoever started it
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: others of this user cannot look into it
    _call(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    if not restrict_files(libc, readable(), signals=not judge):
        watch_files(readable())
    column, arch = NATIVE.get(platform.machine(), (0, 0))
    if not arch or sys.platform != "linux":
        raise OSError(f"no list of system calls for {platform.machine()} {sys.platform}")
    code = filter_code(column, arch, {**ALLOWED, **(OF_THE_JUDGE if judge else {})}.values())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    _call(libc.prctl(22, 2, program, 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def filter_code(column: int, arch: int, allowed: Iterable[tuple[int | None, int | None]]) -> bytes:
    """The filter as classic BPF: what is not allowed fails with EPERM; a call of another architecture kills."""
    lines: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        lines.append((0x20, 0, 0, offset))

    def give(verdict: int) -> None:
        lines.append((0x06, 0, 0, verdict))

    def only_with(
        numbers: tuple[int | None, int | None], argument: int, tests: Collection[tuple[int, int, int]]
    ) -> None:
        """Tests of an argument (jump code, operand, verdict), the last verdict being what else is given."""
        number = numbers[column]
        if number is None:
            return
        lines.append((0x15, 0, 2 + 2 * len(tests), number))
        load(16 + 8 * argument)
        for jump, operand, verdict in tests:
            lines.append((jump, 0, 1, operand))
            give(verdict)
        give(DENY if tests and next(iter(tests))[2] == ALLOW else ALLOW)

    load(4)
    lines.append((0x15, 1, 0, arch))
    give(KILL)
    load(0)
    lines.append((0x35, 0, 1, 0x40000000))  # the x32 calls of x86_64
    give(KILL)
    only_with(OPEN, 1, [(0x45, WRITES, DENY)])
    only_with(OPENAT, 2, [(0x45, WRITES, DENY)])
    only_with(CLONE, 0, [(0x45, THREAD, ALLOW)])
    only_with(FCNTL, 1, [(0x15, command, ALLOW) for command in FCNTL_COMMANDS])
    only_with(IOCTL, 1, [(0x15, command, ALLOW) for command in IOCTL_COMMANDS])
    for numbers, verdict in [(CLONE3, ABSENT), *((n, ALLOW) for n in allowed)]:  # without clone3 libc takes clone
        if numbers[column] is not None:
            lines.append((0x15, 0, 1, numbers[column] or 0))
            give(verdict)
    give(DENY)
    return b"".join(struct.pack("HBBI", *line) for line in lines)


# ---- files -----------------------------------------------------------------------------------------------------------


def readable() -> list[str]:
    """The standard library and shared objects: all that a program may read."""
    found = [*sys.path, os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64"]
    found += ["/usr/lib", "/usr/lib64", "/dev/null", "/dev/urandom"]
    own = os.path.dirname(os.path.abspath(__file__))
    return sorted({os.path.realpath(p) for p in found if p and os.path.exists(p) and os.path.realpath(p) != own})


def restrict_files(libc: ctypes.CDLL, paths: Iterable[str], *, signals: bool) -> bool:
    """Landlock (Linux 5.13 and later): these paths may be read, no other; False where the kernel has none."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    every = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    network = 3 if version >= 4 else 0
    scoped = (3 if signals else 1) if version >= 6 else 0
    attributes = struct.pack("QQQ", every, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _call(libc.syscall(444, attributes, len(attributes), 0))
    for path in paths:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", LANDLOCK_READ if os.path.isdir(path) else LANDLOCK_FILE, handle)
        _call(libc.syscall(445, rules, 1, rule, 0))
        os.close(handle)
    _call(libc.syscall(446, rules, 0))
    os.close(rules)
    return True


def watch_files(paths: Collection[str]) -> None:
    """Where there is no Landlock: Python's own functions open no other file. Native code could."""
    roots = tuple(paths)

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not any(path == root or path.startswith(root + os.sep) for root in roots):
                raise PermissionError(1, "not readable here", path)

    sys.addaudithook(refuse)


def _call(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
