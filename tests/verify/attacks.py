# ruff: noqa: E501 - lines of programs
"""Programs that want out of the sandbox, or a reward they have not earned; and who tries them.

Each is graded against one test whose right output is SECRET. An attack on the walls prints it if it
got through; a cheat looks for it, forges it, or prints it and then misbehaves. So each scores 1 if
it succeeds and 0 if it is held. As a script (`python attacks.py`, perhaps as another user) this
tries them all and prints a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_prime.verify.code_tests import CodeGrader, CodeLimits
from megatron_prime.verify.fork_server import ZYGOTE
from megatron_prime.verify.walls import Isolation

SECRET = "SECRET-" + "49"
TEST_S = 1.0
HONEST_S = 10.0  # seconds that the next program may take on a very busy machine
WITNESS = Path("/tmp/megatron_prime_attack")  # what attacks try to write

HONEST = "```python\nimport sys\nprint(sum(int(x) ** 2 for x in sys.stdin.read().split()))\n```"
HONEST_TRUTH = json.dumps({"inputs": ["1 2 3\n", "10\n"], "outputs": ["14\n", "100\n"]})

# Statements that raise OSError (or nothing worse) if the wall holds.
WALLS = {
    "read a file": "open('/etc/passwd').read()",
    "read a file by descriptor": "import os; os.read(os.open('/etc/passwd', os.O_RDONLY), 10)",
    "read a file through libc": """
import ctypes
fd = ctypes.CDLL(None).open(b'/etc/passwd', 0)
if fd < 0: raise OSError""",
    "read the verifier": f"open({str(ZYGOTE)!r}).read()",
    "read a package": f"open({str(Path(json.__file__).parents[1] / 'site-packages')!r} + '/pip/__init__.py')",
    "read its memory": "open('/proc/self/mem', 'rb')",
    "read its map": "open('/proc/self/maps').read()",
    "read its parent's environment": "import os; open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "list a folder": "import os; os.listdir('/')",
    "list open files": "import os; os.listdir('/proc/self/fd')",
    "write a file": f"open({str(WITNESS)!r}, 'w').write('x')",
    "append to a file": f"open({str(WITNESS)!r}, 'a')",
    "write into the library": "import os; open(os.__file__, 'r+')",
    "write a file without a name": "import os; os.open('/tmp', os.O_TMPFILE | os.O_WRONLY)",
    "truncate by opening": f"import os; os.open({str(WITNESS)!r}, os.O_CREAT | os.O_TRUNC)",
    "make a folder": f"import os; os.mkdir({str(WITNESS)!r})",
    "make a link": f"import os; os.symlink('/etc/passwd', {str(WITNESS)!r})",
    "make a pipe with a name": f"import os; os.mkfifo({str(WITNESS)!r})",
    "rename a file": f"import os; os.rename('/etc/hostname', {str(WITNESS)!r})",
    "remove a file": f"import os; os.unlink({str(WITNESS)!r} + '_bait')",
    "change a mode": f"import os; os.chmod({str(WITNESS)!r} + '_bait', 0o777)",
    "change an owner": f"import os; os.chown({str(WITNESS)!r} + '_bait', -1, -1)",
    "change a time": f"import os; os.utime({str(WITNESS)!r} + '_bait')",
    "change folder": "import os; os.chdir('/etc')",
    "write to a device": "open('/dev/null', 'w')",
    "make a file in memory": "import os; os.memfd_create('x')",
    "make a socket": "import socket; socket.socket()",
    "make a UDP socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "make a Unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "make a pair of sockets": "import socket; socket.socketpair()",
    "connect": "import socket; socket.create_connection(('127.0.0.1', 22))",
    "ask a name server": "import socket; socket.gethostbyname('example.org')",
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "fork through libc": """
import ctypes
pid = ctypes.CDLL(None).fork()
if pid == 0: ctypes.CDLL(None)._exit(0)
if pid < 0: raise OSError""",
    "start a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(30)
    os._exit(0)""",
    "run a program": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "become a program": "import os; os.execv('/bin/echo', ['echo', 'SECRET-' + '49'])",
    "spawn a program": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "run a shell": "import os\nif os.system('true') != 0: raise OSError",
    "kill the fork server": "import os; os.kill(os.getppid(), 9)",
    "kill the verifier": f"import os; os.kill({os.getpid()}, 0)",
    "kill everybody": "import os; os.kill(-1, 0)",
    "kill its group": "import os; os.kill(0, 9)",
    "stop the fork server": "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)",
    "kill through threads": "import os, signal; signal.pthread_kill(os.getppid(), 9)",
    "signal through a descriptor": "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "limit the fork server": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "limit the fork server from a round address": """
import ctypes, os, struct
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
at = libc.mmap(ctypes.c_void_p(1 << 32), ctypes.c_size_t(4096), 3, 0x32, -1, ctypes.c_long(0))
ctypes.memmove(at, struct.pack('QQ', 0, 0), 16)
if libc.prlimit(os.getppid(), 4, ctypes.c_void_p(at), None): raise OSError""",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "be nice": "import os; os.nice(5)",
    "become root": "import os; os.setuid(0)",
    "leave its session": "import os; os.setpgid(0, os.getppid())",
    "set the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
}  # fmt: skip

# System calls by number (x86-64) with arguments that are harmless where the call is let through:
# it then fails with another error than the filter's.
CALLS = {
    "ptrace": (101, 16, "parent", 0, 0), "process_vm_readv": (310, "parent", 0, 0, 0, 0, 0),
    "process_vm_writev": (311, "parent", 0, 0, 0, 0, 0), "kcmp": (312, "parent", "parent", 0, 0, 0),
    "mount": (165, 0, 0, 0, 0, 0), "umount2": (166, 0, 0), "pivot_root": (155, 0, 0),
    "chroot": (161, 0), "unshare": (272, 0), "setns": (308, -1, 0), "swapon": (167, 0, 0),
    "reboot": (169, 0, 0, 0, 0), "sethostname": (170, 0, -1), "init_module": (175, 0, 0, 0),
    "kexec_load": (246, 0, 0, 0, -1), "bpf": (321, 99, 0, 0), "perf_event_open": (298, 0, 0, -1, -1, 0),
    "userfaultfd": (323, -1), "io_uring_setup": (425, 0, 0), "io_setup": (206, 0, 0),
    "keyctl": (250, 99, 0, 0, 0, 0), "add_key": (248, 0, 0, 0, 0, 0), "seccomp": (317, 99, 0, 0),
    "landlock_restrict_self": (446, -1, 99), "open_by_handle_at": (304, -1, 0, 0),
    "name_to_handle_at": (303, -1, 0, 0, 0, 0), "openat2": (437, -100, 0, 0, 0),
    "creat": (85, 0, 0), "truncate": (76, 0, 0), "splice": (275, -1, 0, -1, 0, 0, 0),
    "shmget": (29, 0, 4096, 0o1600), "msgget": (68, 0, 0o1600), "semget": (64, 0, 1, 0o1600),
    "mq_open": (240, 0, 0, 0, 0), "inotify_init": (253,), "fanotify_init": (300, -1, 0),
    "epoll_create1": (291, 0), "eventfd2": (290, 0, 0), "signalfd4": (289, -1, 0, 8, 0),
    "timerfd_create": (283, 1, 0), "timer_create": (222, 1, 0, 0), "pidfd_open": (434, "parent", 0),
    "pidfd_getfd": (438, -1, 0, 0), "tkill": (200, "parent", 0), "tgkill": (234, "parent", "parent", 0),
    "rt_sigqueueinfo": (129, "parent", 0, 0), "vfork": (58,), "clone3": (435, 0, 0),
    "execveat": (322, -1, 0, 0, 0, 0), "setpriority": (141, 0, "parent", 5),
    "sched_setscheduler": (144, 0, 0, 0), "sched_setaffinity": (203, 0, 0, 0),
    "prctl dumpable": (157, 4, 1, 0, 0, 0), "prctl death signal": (157, 1, 0, 0, 0, 0),
    "capset": (126, 0, 0), "personality": (135, 0x40000), "iopl": (172, 3), "acct": (163, 0),
    "quotactl": (179, 0, 0, 0, 0), "syslog": (103, 10, 0, 0), "vhangup": (153,), "setsid": (112,),
    "modify_ldt": (154, 0, 0, 0), "mlockall": (151, 3), "mbind": (237, 0, 0, 0, 0, 0, 0),
    "x32 read": (0x40000000, 0, 0, 0), "ioctl on the terminal": (16, 0, 0x5412, 0),
    "fcntl on owners": (72, 1, 8, "parent"), "fcntl on pipes": (72, 1, 1031, 1 << 20),
    "clone a process": (56, 17, 0, 0, 0, 0), "memfd_secret": (447, 0),
}  # fmt: skip

CALL = """
import ctypes, errno, os
parent = os.getppid()
libc = ctypes.CDLL(None, use_errno=True)
ctypes.set_errno(0)
status = libc.syscall({arguments})
if status == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS, errno.ENOTTY): raise OSError
if status == 0 and {number} in (56, 58): ctypes.CDLL(None)._exit(0)
"""

PRINT = "print('SECRET-' + '49', flush=True)\n"

FLOODS = {
    "loop": "while True: pass",
    "loop in C": "sum(range(10**18))",
    "loop over exceptions": """
while True:
    try: bytearray(1 << 40)
    except BaseException: pass""",
    "backtrack": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "power of powers": "9 ** 9 ** 9 ** 9",
    "sleep": "import time; time.sleep(600)",
    "wait for a signal": "import signal; signal.pause()",
    "wait for a lock": "import threading; l = threading.Lock(); l.acquire(); l.acquire()",
    "read for ever": "import os\nwhile True: os.read(0, 1)",
    "ignore all signals": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)""",
    "fill memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "fill memory at once": "bytearray(1 << 45)",
    "fill memory with small things": "x = []\nwhile True: x = [x, [], {}, 'x' * 100]",
    "map memory": "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(10**6)]\nfor m in x: m.write(b'x')",
    "fill memory and never mind": """
x = []
while True:
    try: x.append(bytearray(1 << 16))
    except MemoryError: pass""",
    "lock memory": "import ctypes\nif ctypes.CDLL(None).mlockall(3): raise OSError\nwhile True: pass",
    "recurse": "f = lambda n: 1 + f(n + 1)\nf(0)",
    "recurse in C": """
x = []
for _ in range(10**6): x = [x]
repr(x)""",
    "write much": "print('x' * 10**9)",
    "write for ever": "while True: print('x' * 1000)",
    "write errors for ever": "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
    "write everywhere for ever": """
import os
while True:
    for fd in range(64):
        try: os.write(fd, b'x' * 4096)
        except OSError: pass""",
    "bomb of forks": """
import os
while True:
    try: os.fork()
    except OSError: pass""",
    "bomb of threads": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(600,)).start()
    except RuntimeError: pass""",
    "bomb of threads through libc": """
import ctypes
libc = ctypes.CDLL(None)
body = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: libc.sleep(600))
thread = ctypes.c_ulong()
while True: libc.pthread_create(ctypes.byref(thread), None, body, None)""",
    "open many files": "import os\nwhile True: os.dup(0)",
    "bomb of compression": "import zlib; c = zlib.compress(bytes(10**8)); zlib.decompress(c) * 100",
    "bomb of pickles": """
import os, pickle
class Bomb:
    def __reduce__(self): return os.execv, ('/bin/echo', ['echo', 'SECRET-' + '49'])
pickle.loads(pickle.dumps(Bomb()))""",
    "crash": "import ctypes; ctypes.string_at(0)",
    "abort": "import os; os.abort()",
    "kill itself": "import os; os.kill(os.getpid(), 9); os._exit(9)",
    "raise": "raise RuntimeError",
    "leave with an error": "import sys; sys.exit(3)",
    "leave at once with an error": "import os; os._exit(3)",
    "leave a thread behind": "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()",
    "never end at the end": "import atexit, time; atexit.register(time.sleep, 600)",
    "close its output and stay": "import os, time; os.close(1); os.close(4); time.sleep(600)",
    "flood the result": "import os\nos.write(4, b'x' * (1 << 30))\nwhile True: os.write(4, b'x' * 65536)",
    "die in its own object": """
class Code:
    def __bool__(self): raise RuntimeError
raise SystemExit(Code())""",
}  # fmt: skip

LOOK = """
import re
def look(text):
    found = re.search('SECRET' + '-[0-9]+', text)
    if found: print(found[0], flush=True)
"""

SCRIPT_CHEATS = {
    "a number that is none": "print('1' * 65000 + 'x')",
    "say nothing": "",
    "leave early": "import os; os._exit(0)",
    "leave in the middle": "import sys; sys.exit(0)\n" + PRINT,
    "no program": "this is not Python",
    "null bytes": "print('\\0')\0" + PRINT,
    "surrogates": PRINT + "x = '\ud800'",
    "nested brackets": PRINT + "(" * 100_000 + ")" * 100_000,
    "long sum": PRINT + "x = " + "1+" * 1_000_000 + "1\n1/0",
    "walk the garbage": LOOK + """
import gc
for thing in gc.get_objects():
    for part in [thing, *gc.get_referents(thing)]:
        try: isinstance(part, (str, bytes)) and look(str(part))
        except Exception: pass""",
    "walk the frames": LOOK + """
import sys
frame = sys._getframe()
while frame:
    look(repr(frame.f_locals) + repr(frame.f_globals))
    frame = frame.f_back""",
    "look at the modules": LOOK + """
import sys
for module in list(sys.modules.values()): look(repr(vars(module)))""",
    "look at the environment": LOOK + "import os, sys; look(repr(os.environ) + repr(sys.orig_argv) + repr(sys.argv))",
    "read the heap": LOOK + """
import ctypes
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
top = libc.sbrk(0)
look(ctypes.string_at(top - (1 << 20), 1 << 20).decode('latin-1'))
for anchor in (id([]), id('a' * 1000)):
    start = anchor >> 18 << 18
    look(ctypes.string_at(start, 1 << 18).decode('latin-1'))""",
    "read all descriptors": LOOK + """
import os
for fd in range(64):
    for read in (lambda: os.pread(fd, 1 << 20, 0), lambda: os.set_blocking(fd, False) or os.read(fd, 1 << 20)):
        try: look(read().decode('latin-1'))
        except OSError: pass""",
    "forge results": """
import os
for forged in (b'+', b'+true', b'+1.0', b'{"id": 0, "reward": 1.0}\\n', b'{"run": 1, "status": 0, "crowded": false}'):
    for fd in range(3, 64):
        try: os.write(fd, forged)
        except OSError: pass""",
    "close everything": "import os\nfor fd in range(256):\n    try: os.close(fd)\n    except OSError: pass",
    "patch everything": """
import builtins, json, sys
yes = lambda *a, **k: True
for name in ('all', 'any', 'isinstance', 'len', 'bool', 'str', 'map', 'zip', 'max', 'exec', 'compile'):
    setattr(builtins, name, yes)
json.dumps = json.loads = yes
sys.exit = sys._getframe = yes""",
    "output that is no text": "import os; os.write(1, bytes(range(256)) * 10)",
    "an output that equals everything": """
import sys
class Equal:
    def __getattr__(self, name): return lambda *a: self
    def __eq__(self, other): return True
sys.stdout = sys.__stdout__ = Equal()""",
}  # fmt: skip

EQUAL = """
class Equal{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    __class__ = property(lambda self: str)
def solve(n): return {value}
"""

CALL_CHEATS = {
    "an object that equals everything": EQUAL.format(base="", value="Equal()"),
    "a text that equals everything": EQUAL.format(base="(str)", value="Equal('x')"),
    "an integer that equals everything": EQUAL.format(base="(int)", value="Equal(7)"),
    "a list that equals everything": EQUAL.format(base="(list)", value="Equal([7])"),
    "a mapping that equals everything": EQUAL.format(base="(dict)", value="Equal(x=7)"),
    "no function": "x = 7",
    "another name": "def solved(n): return 'SECRET-' + '49'",
    "leave instead": "import os\ndef solve(n): os._exit(0)",
    "exit instead": "import sys\ndef solve(n): sys.exit(0)",
    "print instead": "def solve(n): print('SECRET-' + '49')",
    "bytes": "def solve(n): return b'SECRET-49'",
    "a generator": "def solve(n): yield 'SECRET-49'",
    "deep nesting": "def solve(n):\n    x = 'SECRET-49'\n    for _ in range(10**5): x = [x]\n    return x",
    "a loop of lists": "def solve(n):\n    x = []\n    x.append(x)\n    return x",
    "much": "def solve(n): return ['SECRET-49'] * 10**7",
    "a long integer": "def solve(n): return 10 ** 1000000",
    "a forged text of deep nesting": "import os\ndef solve(n):\n    os.write(4, b'[' * 60000)\n    os._exit(0)",
    "a forged text of many digits": "import os\ndef solve(n):\n    os.write(4, b'9' * 60000)\n    os._exit(0)",
    "two results": "import os\ndef solve(n):\n    os.write(4, b'\"x\"')\n    return 'SECRET-' + '49'",
    "return and never end": """
import threading, time
def solve(n):
    threading.Thread(target=time.sleep, args=(600,)).start()
    return 'SECRET-' + '49'""",
    "print the result and never end": """
import os
def solve(n):
    os.write(4, b'"SECRET-49"')
    while True: pass""",
}  # fmt: skip


@dataclass(frozen=True)
class Attack:
    name: str
    source: str
    is_call: bool = False

    @property
    def truth(self) -> str:
        parts = {"fn_name": "solve", "inputs": [[7]]} if self.is_call else {"inputs": ["7\n"]}
        return json.dumps({**parts, "outputs": [SECRET]})

    def graded_by(self, grader: CodeGrader) -> float:
        return grader.grade(f"```python\n{self.source}\n```", self.truth)


def _call_attack(name: str) -> Attack:
    number, *arguments = CALLS[name]
    source = CALL.format(number=number, arguments=", ".join(map(str, (number, *arguments))))
    return Attack(f"call {name}", source + PRINT)


WALL_ATTACKS = [Attack(name, f"{source}\n{PRINT}") for name, source in WALLS.items()]
CALL_ATTACKS = [_call_attack(name) for name in CALLS] if os.uname().machine == "x86_64" else []
ATTACKS = [
    *WALL_ATTACKS,
    *CALL_ATTACKS,
    *(Attack(name, PRINT + source) for name, source in FLOODS.items()),
    *(Attack(name, source) for name, source in SCRIPT_CHEATS.items()),
    *(Attack(name, source, is_call=True) for name, source in CALL_CHEATS.items()),
]


def limits(isolation: Isolation) -> CodeLimits:
    return CodeLimits(test_s=TEST_S, total_s=2 * TEST_S, isolation=isolation)


def left_behind(parent: int) -> list[int]:
    """Processes that came out of the fork servers of `parent`, beside those servers."""
    mark, found = f'"parent": {parent},'.encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = mark in (folder / "cmdline").read_bytes()
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # gone, or another user's
            continue
        if is_ours and int(fields[1]) != parent and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def main(kind: str, which: str) -> None:
    """Try `which` ("walls" or "all"); with the `kind` "seccomp" as if there were no Landlock."""
    grader = CodeGrader(limits(Isolation(memory_mib=256, landlock=kind == "landlock")))
    for attack in WALL_ATTACKS + CALL_ATTACKS if which == "walls" else ATTACKS:
        score = attack.graded_by(grader)
        started = time.monotonic()
        honest = grader.grade(HONEST, HONEST_TRUTH)
        seconds = time.monotonic() - started
        left = left_behind(os.getpid())
        print(json.dumps([attack.name, score, honest, seconds, left]), flush=True)
    grader.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
