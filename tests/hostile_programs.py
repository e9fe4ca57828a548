"""Programs that want out of the sandbox, and what each of them wants."""

from __future__ import annotations

TRIES = r"""
import ctypes, mmap, os, signal, socket, subprocess, sys, threading, time

LIBC = ctypes.CDLL(None, use_errno=True)

def descriptors():
    for number in range(5, 1024):
        try:
            os.fstat(number)
        except OSError:
            continue
        return
    raise OSError
def fork(): os.fork() or os._exit(0)
def fork_by_libc():
    child = LIBC.fork()
    if child == 0: os._exit(0)
    _needs(child)
def thread(): threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
def program(): subprocess.run(["/bin/sh", "-c", "exit"], check=True)
def replace_itself(): os.execv("/bin/true", ["true"])
def write_in_tmp(): open(TARGET, "w").close()
def write_at_home(): open(os.path.expanduser("~root/.fusionroute-probe"), "w").close()
def write_in_project(): open(os.path.join(PROJECT, "fusionroute-probe"), "w").close()
def write_here(): open("fusionroute-probe", "w").close()
def append(): os.open(EXISTING, os.O_WRONLY | os.O_APPEND)
def truncate(): os.truncate(EXISTING, 0)
def delete(): os.unlink(EXISTING)
def rename(): os.rename(EXISTING, EXISTING + "x")
def make_folder(): os.mkdir(TARGET)
def make_link(): os.symlink("/", TARGET)
def change_mode(): os.chmod(EXISTING, 0o777)
def memory_file(): os.memfd_create("x")
def read_users(): open("/etc/passwd").close()
def read_project(): open(EXISTING).close()
def list_project(): os.listdir(os.path.dirname(EXISTING))
def list_processes(): os.listdir("/proc")
def read_own_memory(): open("/proc/self/mem", "rb").close()
def examiners_descriptors(): os.listdir(f"/proc/{os.getppid()}/fd")
def tcp_loopback(): socket.create_connection(("127.0.0.1", PORT), timeout=1)
def udp(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def tcp6(): socket.socket(socket.AF_INET6)
def unix_socket(): socket.socket(socket.AF_UNIX).connect("\0fusionroute-probe")
def pair_of_sockets(): socket.socketpair()
def netlink(): socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
def packets(): socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
def kill_parent(): os.kill(os.getppid(), 0)
def kill_everybody(): os.kill(-1, 0)
def kill_evaluation(): os.kill(EVALUATION, 0)
def signal_by_pipe():
    import fcntl
    read, write = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETOWN, os.getppid())
def leave_group(): os.setsid()
def own_group(): os.setpgid(0, 0)
def limit_parent():
    import resource
    resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))
def lift_limits():
    import resource
    try:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    except ValueError as error:
        raise OSError from error
def become_root(): os.setuid(0)
def change_root(): os.chroot("/")
def nice(): os.setpriority(os.PRIO_PROCESS, 0, -5)
def unshare(): _needs(LIBC.unshare(0x10000000))
def trace(): _needs(LIBC.ptrace(16, os.getppid(), 0, 0))
def outlive_parent(): _needs(LIBC.prctl(1, 0))
def dumpable(): _needs(LIBC.prctl(4, 1))
def io_uring(): _needs(LIBC.syscall(425, 1, ctypes.create_string_buffer(200)))
def bpf(): _needs(LIBC.syscall({"x86_64": 321, "aarch64": 280}[os.uname().machine], 0, 0, 0))
def keys(): _needs(LIBC.syscall({"x86_64": 250, "aarch64": 219}[os.uname().machine], 0, -3, 1))
def read_parents_memory(): _needs(LIBC.syscall(310, os.getppid(), 0, 0, 0, 0, 0))
def open_parent(): _needs(LIBC.syscall(434, os.getppid(), 0))
def environment():
    if set(os.environ) - {"PYTHONHASHSEED", "LC_ALL", "LC_CTYPE"}: return
    raise OSError
def tests_in_memory():
    import gc
    for each in gc.get_objects():
        if isinstance(each, dict) and "token" in each: return
    raise OSError
def tests_in_frames():
    frame = sys._getframe()
    while frame:
        if "tests" in frame.f_locals: return
        frame = frame.f_back
    raise OSError

def _needs(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def reached(names):
    found = []
    for name in names:
        try:
            globals()[name]()
        except (OSError, RuntimeError):
            continue
        found.append(name)
    return found
"""
"""Defines `reached`, which tries what is named and says what it managed; the first line names what it may touch."""

NAMES = tuple(
    line.removeprefix("def ").partition("(")[0]
    for line in TRIES.splitlines()
    if line.startswith("def ") and not line.startswith(("def _", "def reached"))
)

ENDLESS = {
    "loops": "def f():\n    while True: pass",
    "loops in C": "def f(): return sum(range(10**15))",
    "loops while it is loaded": "while True: pass",
    "sleeps": "import time\ndef f(): time.sleep(1000)",
    "ignores signals": (
        "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ndef f():\n    while True: pass"
    ),
    "closes what it is asked through": (
        "import os, time\ndef f():\n    os.closerange(0, 100)\n    while True: time.sleep(1)"
    ),
    "forks and sleeps": (
        "import os, time\ndef f():\n    while True:\n        try: os.fork()\n        except OSError: time.sleep(0.01)"
    ),
    "prints for ever": "def f():\n    while True: print('x' * 100000)",
    "eats memory bit by bit": (
        "def f():\n    kept = []\n    while True:\n        try: kept.append(bytearray(1 << 20))\n"
        "        except MemoryError: pass"
    ),
}
"""None of them comes back."""

FORGERS = {
    "exits with 0": "import os\ndef f(): os._exit(0)",
    "exits with 0 at once": "import os\nos._exit(0)",
    "raises SystemExit": "import sys\ndef f(): sys.exit(0)",
    "raises SystemExit at once": "import sys\nsys.exit(0)",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(): return 4",
    "answers everybody": (
        'import os\ndef f():\n    for number in range(1024):\n        for text in (b\'{"status":"passed","note":""}\','
        " b'passed'):\n            try: os.write(number, text)\n            except OSError: pass\n    return 4"
    ),
    "equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    def __hash__(self): return 0\ndef f(): return Any(4)"
    ),
    "is near everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __sub__(self, other): return 0\n"
        "    def __lt__(self, other): return True\n    def __abs__(self): return 0\n"
        "    def __contains__(self, x): return True\n    def __rsub__(self, other): return 0\n"
        "    def __iter__(self): return iter(())\ndef f(): return Any()"
    ),
    "patches built-ins": (
        "import builtins\nbuiltins.abs = lambda value: 0\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
        "builtins.isinstance = lambda *args: True\nabs = lambda value: 0\nassert_equal = lambda *args: None\n"
        "def f(): return 4"
    ),
    "patches what compares": "import math\nmath.isclose = lambda *args, **named: True\ndef f(): return 4",
    "raises what tests catch": "def f(): raise AssertionError('passed')",
    "breaks the frame": "import os\ndef f():\n    os.write(4, b'\\xff\\xff\\xff\\xff')\n    return 4",
    "answers before it is asked": (
        'import os\ntext = b\'{"result":null,"changed":[null]}\'\n'
        "os.write(4, len(text).to_bytes(4, 'little') + text)\ndef f(): return 4"
    ),
    "returns itself": "def f():\n    kept = []\n    kept.append(kept)\n    return kept",
    "returns too much": "def f(): return 'x' * (17 << 20)",
    "asks for a huge string": "def f(): return len('x' * (1 << 40))",
    "crashes": "import ctypes\ndef f(): return ctypes.string_at(0)",
    "is no Python": "def f(:",
    "defines nothing": "x = 5",
}
"""Wrong programs that would like to be right: f() shall be 5."""
