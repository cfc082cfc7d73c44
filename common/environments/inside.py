"""The program of the Python tool's process (see sandbox.py): python inside.py CPU_SECONDS BYTES < code

Imports are few and late, since each is paid on every call.
"""

import os
import resource
import sys

MARK, OUT_OF_MEMORY = b"\0", 77  # as in sandbox.py
NAME = "<code>"  # of the file that tracebacks speak of
HARMLESS = """array.__new__ builtins.id builtins.input builtins.input/result code.__new__ compile exec function.__new__
    marshal.dumps marshal.load marshal.loads object.__delattr__ object.__getattr__ object.__setattr__ os.putenv
    os.unsetenv pickle.find_class sys._getframe sys._getframemodulename sys.excepthook sys.unraisablehook time.sleep"""
MODULES = """_ctypes _dbm _gdbm _interpreters _multiprocessing _posixshmem _posixsubprocess _testcapi _testinternalcapi
    _xxsubinterpreters ctypes mmap posix readline spwd"""  # these act without an event


def limit(seconds: int, memory: int) -> None:
    """Threads count as processes. Root is not bound by NPROC: refuse and close_kernel see to that."""
    limits = {"CPU": seconds, "AS": memory, "FSIZE": 0, "NPROC": 0, "NOFILE": 64, "CORE": 0}
    for name, value in limits.items():
        try:  # noqa: SIM105, importing contextlib would cost 2 ms
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, ValueError, OSError):  # not on this system, or a lower limit is in force
            pass


def close_kernel(libraries: tuple[str, ...]) -> None:
    """Second layer, from the Linux kernel if it offers it, for this process and irrevocably: Landlock refuses all
    files but reading libraries, running programs, TCP, and signals to others; seccomp refuses new processes and
    threads, sockets, signals and the doors to other processes. Constants: linux/landlock.h, seccomp.h, bpf_common.h.
    """
    import ctypes
    import struct

    libc = ctypes.CDLL(None)
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: killed when the thread that waits for us dies
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which both need root
    if (version := libc.syscall(444, None, 0, 1)) > 0:  # landlock_create_ruleset, asked for its version
        rights = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1  # every right on files that this version knows
        handled = struct.pack("QQQ", rights, 3 * (version >= 4), 3 * (version >= 6))  # files, TCP, scopes
        rules = libc.syscall(444, handled, len(handled), 0)
        for path in filter(os.path.exists, libraries):
            reading = 0b1100 if os.path.isdir(path) else 0b100  # READ_FILE, READ_DIR
            libc.syscall(445, rules, 1, struct.pack("=Qi", reading, os.open(path, os.O_PATH)), 0)
        libc.syscall(446, rules, 0)
        os.closerange(3, 64)
    # socket, socketpair, clone, fork, vfork, execve, execveat, kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo, ptrace,
    # process_vm_readv, process_vm_writev, pidfd_send_signal, io_uring_setup, pidfd_open, clone3
    calls = {
        "x86_64": (41, 53, 56, 57, 58, 59, 322, 62, 200, 129, 297, 101, 310, 311, 424, 425, 434, 435),
        "aarch64": (198, 199, 220, 221, 281, 129, 130, 138, 240, 117, 270, 271, 424, 425, 434, 435),
    }.get(os.uname().machine, ())
    steps = [(0x20, 0, 0, 0)]  # load the number of the system call
    steps += [(0x15, len(calls) - i, 0, number) for i, number in enumerate(calls)]  # if equal, jump to the last step
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]  # return: allowed; EPERM
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    libc.prctl(22, 2, struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program)), 0, 0)  # PR_SET_SECCOMP
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]  # so that an import of it is an event again


def never(what: str):
    def refused(*args, **kwargs):
        raise PermissionError(f"{what} is not allowed in this tool")

    return refused


def refuse(library: str) -> None:
    """First layer: every operation that Python audits and that is not known to be harmless is a PermissionError.

    What the hook uses are locals of this function: the code can replace builtins and our globals, not these.
    """
    import _posixsubprocess
    import _thread
    import posix

    _posixsubprocess.fork_exec = never("starting processes")  # these five raise no event
    _thread.start_new_thread = never("starting threads")
    os.mkfifo = os.mknod = posix.mkfifo = posix.mknod = never("changing files")
    os.pidfd_open = posix.pidfd_open = never("sending signals")
    text, kind, error = str, type, PermissionError
    harmless, modules = frozenset(HARMLESS.split()), frozenset(MODULES.split())
    network = ("socket.", "urllib.", "http.", "ftplib.", "imaplib.", "nntplib.", "poplib.", "smtplib.", "telnetlib.")
    processes = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.", "subprocess.")
    files = ("os.ch", "os.l", "os.mk", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "os.utime")
    kinds = {
        network: "network access",
        processes: "starting processes",
        ("os.kill", "signal."): "sending signals",
        (*files, "shutil.", "tempfile."): "changing files",
    }
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path) -> bool:
        ours = kind(path) is text and (path + "/").startswith(library)
        return ours and "/.." not in path and "-packages" not in path

    def hook(event: str, args: tuple) -> None:
        if event in harmless:
            return
        if event == "import":
            names = {args[0], (args[1] or "").rpartition("/")[2].partition(".")[0]}
            what = f"the module {args[0]}" if names & modules else ""
        elif event == "open":
            what = "reading files" if not inside(args[0]) else ""
            what = "writing files" if args[2] & writing else what
            what = "" if kind(args[0]) is kind(0) else what  # a descriptor that is open already
        elif event in ("os.listdir", "os.scandir"):
            what = "" if inside(args[0]) else "reading folders"
        else:
            what = event
            for starts in kinds:
                what = kinds[starts] if event.startswith(starts) else what
        if what:
            raise error(f"{what} is not allowed in this tool")

    sys.addaudithook(hook)


def describe(error: BaseException) -> str:
    """As the last line of a traceback, with the line of the code that it comes from."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:
        text = type(error).__name__
    line, step = 0, error.__traceback__
    while step:
        line, step = step.tb_lineno if step.tb_frame.f_code.co_filename == NAME else line, step.tb_next
    return f"{text} (line {line})" if line else text


def show(code: str, space: dict) -> str:
    """Execute the code; the value of a last expression as a notebook shows it."""
    tree = compile(code, NAME, "exec", 0x400, dont_inherit=True)  # PyCF_ONLY_AST, without the costly import of ast
    last = tree.body.pop() if tree.body and type(tree.body[-1]).__name__ == "Expr" else None
    exec(compile(tree, NAME, "exec", dont_inherit=True), space)
    if last is None:
        return ""
    expression = compile("0", NAME, "eval", 0x400)
    expression.body = last.value
    value = eval(compile(expression, NAME, "eval", dont_inherit=True), space)
    return "" if value is None else repr(value)


def main() -> None:
    limit(int(sys.argv[1]), int(sys.argv[2]))
    library = os.path.dirname(os.__file__) + "/"
    try:  # noqa: SIM105
        close_kernel((sys.base_prefix, "/lib", "/lib64", "/usr", "/nix/store", "/etc/ld.so.cache"))
    except Exception:  # another system, or a Python without ctypes
        pass
    refuse(library)
    write, leave, status = os.write, os._exit, 0  # the code may replace those of os
    write(1, MARK)
    try:
        code, module = sys.stdin.buffer.read().decode(), type(sys)("__main__")
        sys.modules["__main__"], sys.argv[:] = module, [NAME]
        os.environ.clear()
        sys.unraisablehook = lambda ignored: print("ignored:", describe(ignored.exc_value), file=sys.stderr)
        try:
            text = show(code, vars(module))
        except SystemExit as stop:
            told = isinstance(stop.code, (int, type(None)))
            text, status = "" if told else str(stop.code), (stop.code or 0) & 255 if told else 1
        except MemoryError:
            raise
        except BaseException as error:
            text, status = describe(error), 1
        write(1, MARK + text.encode("utf-8", "backslashreplace"))
    except MemoryError:
        status = OUT_OF_MEMORY
    except BaseException:  # its output is closed, or a handler of a signal raises
        status = status or 1
    leave(status)  # without the code's atexit handlers and finalizers


if __name__ == "__main__":
    main()
