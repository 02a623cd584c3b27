"""Programs that try to pass without solving their task, to get out of the sandbox, or to bring the scorer down.

The task is f(x) = x * x + 1, tested on inputs that the program is not told (TASKS). In a program HOST stands for a
folder on the host that holds `secret.txt`, PORT for a TCP port on which the host listens. Each attack has the
verdicts that count as withstood; `passed` is in none. GROUPS has them by what they try; NOT_HELD those that a weaker
kind of sandbox does not withstand.
"""

from common.trajectory import Task

TESTS = ["assert f(3) == 10", "assert f(41) == 1682\nassert [f(1), f(2)] == [2, 5]\nassert not f(0) > 1"]
TASKS = {
    "function": Task("f", "x * x + 1", None, {"test_method": "function", "test_list": TESTS, "test_time_limit": 0.5}),
    "stdio": Task(
        "io",
        "x * x + 1",
        None,
        {"test_method": "stdio", "test_input": ["41\n"], "test_output": ["1682\n"], "test_time_limit": 0.5},
    ),
}
SOLUTIONS = {"function": "def f(x):\n    return x * x + 1", "stdio": "x = int(input())\nprint(x * x + 1)"}

WRONG = ("failed", "crashed")
STOPPED = ("failed", "crashed", "timeout", "memory")
FULL = (*STOPPED, "output_limit")
F = "\ndef f(x):\n    return 0\n"  # a wrong answer after the attack was made
LIAR = "class Liar({base}):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
LIAR += "    __hash__ = {base}.__hash__\n    __gt__ = __lt__ = __bool__ = lambda self, *other: True\n"

EXITS = {
    "raise SystemExit on import": ("function", "raise SystemExit", WRONG),
    "raise SystemExit in the function": ("function", "def f(x): raise SystemExit(0)", WRONG),
    "sys.exit(0) without output": ("stdio", "import sys; sys.exit(0)", WRONG),
    "os._exit(0) on import": ("function", "import os; os._exit(0)", WRONG),
    "os._exit(0) in the function": ("function", "import os\ndef f(x): os._exit(0)", WRONG),
    "os._exit(0) without output": ("stdio", "import os; os._exit(0)", WRONG),
    "exit code of a MemoryError claimed": ("stdio", "import os; os._exit(77)", ("memory",)),
    "raise KeyboardInterrupt": ("function", "def f(x): raise KeyboardInterrupt", WRONG),
    "raise GeneratorExit": ("function", "def f(x): raise GeneratorExit", WRONG),
    "raise StopIteration": ("function", "def f(x): raise StopIteration", WRONG),
    "raise AssertionError with a hostile text": (
        "function",
        "class AssertionError(AssertionError):\n    def __str__(self): return 'passed' * 10**6\n"
        "def f(x): raise AssertionError",
        (*WRONG, "output_limit"),
    ),
    "abort after the right output": ("stdio", SOLUTIONS["stdio"] + "\nimport os; os.abort()", WRONG),
    "os.execv of another program": ("stdio", "import os; os.execv('/bin/true', ['true'])", WRONG),
    "the answer by an exit hook that raises": (
        "stdio",
        "import atexit, os\natexit.register(lambda: os._exit(0))",
        WRONG,
    ),
}
LIES = {
    "object whose __eq__ is always true": ("function", LIAR.format(base="object") + "def f(x): return Liar()", WRONG),
    "int with such an __eq__": ("function", LIAR.format(base="int") + "def f(x): return Liar()", WRONG),
    "float with such an __eq__": ("function", LIAR.format(base="float") + "def f(x): return Liar()", WRONG),
    "str with such an __eq__": ("function", LIAR.format(base="str") + "def f(x): return Liar()", WRONG),
    "class in place of the function": ("function", LIAR.format(base="int") + "f = Liar", WRONG),
    "builtins and AssertionError replaced": (
        "function",
        "import builtins\nbuiltins.AssertionError = builtins.len = builtins.all = lambda *a, **k: True\n"
        "builtins.int = builtins.isinstance = lambda *a: True" + F,
        WRONG,
    ),
    "json, struct and pickle replaced": (
        "function",
        "import json, pickle, struct\njson.dumps = pickle.dumps = lambda *a, **k: '{\"value\": true}'\n"
        "json.loads = pickle.loads = lambda *a, **k: True" + F,
        WRONG,
    ),
    "os.write replaced": (
        "function",
        "import os\nreal = os.write\nos.write = lambda fd, data: real(fd, b'passed') and len(data)" + F,
        STOPPED,
    ),
    "encoder of the channel replaced": (
        "function",
        "import sys\nvalues = sys.modules['values']\nvalues.encode = lambda value, refer: {'object': 0}" + F,
        WRONG,
    ),
    "every value a proxy": (
        "function",
        "import sys\nsys.modules['values'].encode = lambda value, refer: {'object': refer(value)}\ndef f(x): return f",
        WRONG,
    ),
    "NaN": ("function", "def f(x): return float('nan')", WRONG),
    "endless generator": ("function", "import itertools\ndef f(x): return (n for n in itertools.count())", WRONG),
    "module math redefined": ("function", "class math:\n    fabs = staticmethod(lambda x: 0.0)" + F, WRONG),
}
FORGERIES = {
    "a line that says passed": ("function", "print('passed')\nprint('{\"verdict\": \"passed\"}')" + F, WRONG),
    "passed written to every descriptor": (
        "function",
        "import os\nfor fd in range(256):\n    try: os.write(fd, b'passed')\n    except OSError: pass" + F,
        WRONG,
    ),
    "replies sent ahead of the calls": (
        "function",
        "import os, struct\nbody = b'{\"value\": true}'\nos.write(3, (struct.pack('>I', len(body)) + body) * 50)" + F,
        WRONG,
    ),
    "a message of 4 GB announced": ("function", "import os\ndef f(x): os.write(3, b'\\xff' * 8)\n", STOPPED),
    "a message nested 100,000 deep": (
        "function",
        "import os, struct\ndef f(x):\n    body = b'[' * 10**5\n    os.write(3, struct.pack('>I', len(body)) + body)\n",
        STOPPED,
    ),
    "an integer of a million digits": ("function", "def f(x): return 10 ** 10**6", WRONG),
    "a cyclic list": ("function", "a = []\na.append(a)\ndef f(x): return a", WRONG),
    "an exception with 10 MB of text": (
        "function",
        "def f(x): raise ValueError('x' * 10**7)",
        (*WRONG, "output_limit"),
    ),
    "the tests' own code run by the program": (
        "function",
        "import os, sys\nsys.path.append('/inside')\nimport programs\n"
        "try: programs.run_tests({'setup': '', 'tests': [], 'entry_point': None})\nexcept BaseException: pass" + F,
        STOPPED,
    ),
    "the channel closed": ("function", "import os\nos.close(3)" + F, WRONG),
    "every number printed": ("stdio", "for n in range(2000): print(n)", WRONG),
    "output that shows the answer, then hides it": ("stdio", "print('1682\\r\\x1b[2K\\x001682')", WRONG),
}
SPYING = {
    "the test looked for in all frames": (
        "function",
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "            if isinstance(value, (list, tuple, str)) and 'assert ' + 'f(' in str(value): return x * x + 1\n"
        "        frame = frame.f_back\n    return 0\n",
        WRONG,
    ),
    "the test looked for in all objects": (
        "function",
        "import gc\ndef f(x):\n    for one in gc.get_objects():\n"
        "        if isinstance(one, (dict, list)) and any(isinstance(v, str) and 'assert ' + 'f(3' in v for v in "
        "(one.values() if isinstance(one, dict) else one)): return x * x + 1\n    return 0\n",
        STOPPED,
    ),
    "the test looked for in files": (
        "function",
        "import os\ndef f(x):\n"
        "    for top in ('/tmp', '/inside', '/dev', '/proc', '/run', '/home', '/root', '/var', '/etc'):\n"
        "        for folder, _, names in os.walk(top):\n            if 'lib/python' in folder: continue\n"
        "            for name in names:\n                try:\n"
        "                    text = open(os.path.join(folder, name), 'rb').read(10**6)\n"
        "                    if b'assert ' + b'f(3)' in text: return x * x + 1\n"
        "                except OSError: pass\n    return 0\n",
        STOPPED,
    ),
    "the answer looked for behind descriptors": (
        "stdio",
        "import os\nfor fd in range(3, 300):\n    try: os.lseek(fd, 0, 0)\n    except OSError: pass\n"
        "    try: print(os.read(fd, 10**6).decode(errors='replace'))\n    except OSError: pass\n",
        WRONG,
    ),
    "/proc of other processes": (
        "function",
        "import glob\nfound = ''\nfor name in glob.glob('/proc/[0-9]*/*'):\n"
        "    try: found += open(name, errors='replace').read(10**5)\n    except OSError: pass\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "/proc/1/mem and /proc/self/mem": (
        "function",
        "found = False\nfor name in ('/proc/1/mem', '/proc/self/mem', '/proc/self/maps', '/dev/mem', '/dev/kmsg'):\n"
        "    try:\n        open(name, 'rb'); found = True\n    except OSError: pass\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "ptrace of the parent": (
        "function",
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nothers = [pid for pid in range(1, 200) if pid != os.getpid()]\n"
        "found = any(libc.ptrace(16, pid, 0, 0) == 0 for pid in others)\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "memory of other processes by process_vm_readv": (
        "function",
        "import ctypes\nlibc = ctypes.CDLL(None)\nfound = libc.process_vm_readv(2, None, 0, None, 0, 0) == 0\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "the host's file read": (
        "function",
        "found = False\nfor name in ('HOST/secret.txt', '/etc/passwd', '/etc/shadow', '/proc/version'):\n"
        "    try: found = bool(open(name).read(1)) or found\n    except OSError: pass\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "the host's folders listed": (
        "function",
        "import os\nfound = False\nfor name in ('HOST', '/etc', '/home', '/dev/shm', '/var/tmp'):\n"
        "    try: found = bool(os.listdir(name)) or found\n    except OSError: pass\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "the host's file asked for by its name": (
        "function",
        "import os\nfound = os.path.exists('HOST/secret.txt')\ndef f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "the host's folder watched": (
        "function",
        "import ctypes\nlibc = ctypes.CDLL(None)\nwatch = libc.inotify_init()\n"
        "found = libc.inotify_add_watch(watch, b'HOST', 0x200) > 0\ndef f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
}
ESCAPES = {
    "the home folder deleted": (
        "function",
        "import os, shutil\nfor top in ('HOST', os.path.expanduser('~'), '/root', '/home', '/'):\n"
        "    shutil.rmtree(top, ignore_errors=True)" + F,
        STOPPED,
    ),
    "a file written outside": ("function", "open('HOST/secret.txt', 'w').write('x')" + F, WRONG),
    "a file made outside": (
        "function",
        "import os\nfor make in (lambda: open('HOST/new', 'x'), lambda: os.mkdir('HOST/folder'), "
        "lambda: os.mkfifo('HOST/fifo'), lambda: os.symlink('x', 'HOST/link')):\n"
        "    try: make()\n    except OSError: pass" + F,
        WRONG,
    ),
    "a file outside removed or renamed": (
        "function",
        "import os\nfor change in (lambda: os.rename('HOST/secret.txt', 'HOST/other'), "
        "lambda: os.rename('HOST/secret.txt', 'mine'), lambda: os.unlink('HOST/secret.txt')):\n"
        "    try: change()\n    except OSError: pass" + F,
        WRONG,
    ),
    "a file outside emptied": (
        "function",
        "import os\nfor change in (lambda: os.truncate('HOST/secret.txt', 0), "
        "lambda: os.open('HOST/secret.txt', os.O_RDONLY | os.O_TRUNC), "
        "lambda: os.open(os.__file__, os.O_RDONLY | os.O_TRUNC), lambda: os.truncate(os.__file__, 0)):\n"
        "    try: change()\n    except OSError: pass" + F,
        WRONG,
    ),
    "mode, times, owner and attributes outside changed": (
        "function",
        "import os\nfor name in ('HOST/secret.txt', 'HOST'):\n"
        "    for change in (lambda: os.chmod(name, 0), lambda: os.utime(name, (1, 1)), "
        "lambda: os.chown(name, -1, 65534), lambda: os.setxattr(name, 'user.x', b'1')):\n"
        "        try: change()\n        except OSError: pass" + F,
        WRONG,
    ),
    "Python's own library overwritten": ("function", "import json\nopen(json.__file__, 'w').write('x')" + F, WRONG),
    "the sandbox's own code overwritten": ("function", "open('/inside/programs.py', 'w').write('x')" + F, WRONG),
    "symlink to a file outside": (
        "function",
        "import os\nos.symlink('HOST/secret.txt', 'link')\nopen('link', 'w').write('x')" + F,
        WRONG,
    ),
    "hard link to a file outside": ("function", "import os\nos.link('HOST/secret.txt', 'link')" + F, WRONG),
    "path of many ..": ("function", "open('../' * 40 + 'HOST/secret.txt', 'w').write('x')" + F, WRONG),
    "TCP to the host": (
        "function",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT)).send(b'x')" + F,
        WRONG,
    ),
    "UDP and name look-up": ("function", "import socket\nsocket.getaddrinfo('example.com', 80)" + F, WRONG),
    "abstract unix socket": (
        "function",
        "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0' + 'meet')" + F,
        WRONG,
    ),
    "new user namespace": (
        "function",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nfound = libc.unshare(0x10000000) == 0\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "mount, umount, chroot": (
        "function",
        "import ctypes\nlibc = ctypes.CDLL(None)\nfound = 0 in (libc.umount2(b'/proc', 2), libc.umount2(b'/tmp', 2), "
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.chroot(b'/tmp'))\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "root again": ("function", "import os\nos.setuid(0)" + F, WRONG),
    "limits raised": (
        "function",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))" + F,
        WRONG,
    ),
    "parent killed": ("function", "import os\nos.kill(os.getppid(), 9)" + F, WRONG),
    "parent killed after the right output": (
        "stdio",
        "import os\nprint('1682', flush=True)\nos.kill(os.getppid(), 9)\nraise SystemExit(3)",
        WRONG,
    ),
    "everybody killed": ("function", "import os\nos.kill(-1, 9)" + F, WRONG),
    "signals to the parent": (
        "function",
        "import os, signal\nfor number in (1, 2, 10, 12, 15, 19):\n    os.kill(os.getppid(), number)" + F,
        WRONG,
    ),
    "a signal by a descriptor's owner": (
        "function",
        "import fcntl, os\nread, write = os.pipe()\nfcntl.fcntl(read, 10, 9)\n"  # F_SETSIG
        "fcntl.fcntl(read, fcntl.F_SETOWN, os.getppid())\nfcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)\n"
        "os.write(write, b'x')" + F,
        WRONG,
    ),
    "the parent slowed down": (
        "function",
        "import os\nparent, found = os.getppid(), False\nfor slow in (lambda: os.sched_setaffinity(parent, {0}), "
        "lambda: os.setpriority(os.PRIO_PROCESS, parent, 19), "
        "lambda: os.sched_setscheduler(parent, os.SCHED_IDLE, os.sched_param(0))):\n"
        "    try:\n        slow()\n        found = parent > 0\n    except OSError: pass\n"
        "def f(x): return x * x + 1 if found else 0\n",
        WRONG,
    ),
    "daemon left behind": (
        "function",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n"
        "    os._exit(0)" + F,
        WRONG,
    ),
    "daemon that ignores signals": (
        "stdio",
        "import os, signal, time\nif os.fork() == 0:\n    os.setsid()\n    for n in range(1, 65):\n"
        "        try: signal.signal(n, signal.SIG_IGN)\n        except (OSError, ValueError): pass\n"
        "    while True: time.sleep(100)\nprint(0)",
        (*WRONG, "timeout"),
    ),
    "shared memory left behind": (
        "function",
        "from multiprocessing import shared_memory\nshared_memory.SharedMemory('left', True, 1000)" + F,
        WRONG,
    ),
}
FLOODS = {
    "fork bomb": ("function", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", STOPPED),
    "fork bomb by subprocess": (
        "function",
        "import subprocess, sys\nwhile True: subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)'])",
        STOPPED,
    ),
    "threads without end": (
        "function",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
        STOPPED,
    ),
    "daemon threads that spin": (
        "function",
        "import threading\ndef spin():\n    while True: pass\n"
        "for _ in range(20): threading.Thread(target=spin, daemon=True).start()\ndef f(x):\n    while True: pass\n",
        ("timeout",),
    ),
    "10 GB allocated": ("function", "x = bytearray(10 * 10**9)" + F, ("memory",)),
    "10 GB allocated in the function": ("function", "def f(x): return bytearray(10 * 10**9)", ("memory",)),
    "a list that grows for ever": (
        "stdio",
        "x = []\nwhile True: x.append('x' * 10**6 + str(len(x)))",
        ("memory", "timeout"),
    ),
    "memory of many children": (
        "stdio",
        "import os, time\nfor _ in range(12):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (400 << 20)\n"
        "        time.sleep(100)\ntime.sleep(100)",
        ("memory", "timeout", "crashed"),
    ),
    "infinite loop": ("function", "def f(x):\n    while True: pass", ("timeout",)),
    "infinite loop on import": ("function", "while True: pass", ("timeout",)),
    "infinite loop that ignores signals": (
        "stdio",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        ("timeout",),
    ),
    "one operation without end, in C": ("function", "def f(x): return len(str(9 ** 9 ** 9))", ("timeout", "memory")),
    "regular expression without end": (
        "function",
        "import re\ndef f(x): return re.match('(a+)+b', 'a' * 60)",
        ("timeout",),
    ),
    "processor time of children": (
        "stdio",
        "import os\nfor _ in range(8):\n    if os.fork() == 0:\n        while True: pass\nos.wait()",
        ("timeout", "crashed"),
    ),
    "sleep for ever": ("stdio", "import time; time.sleep(10**6)", ("timeout",)),
    "infinite recursion": ("function", "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)", STOPPED),
    "infinite output": ("stdio", "while True: print('x' * 10**6)", ("output_limit",)),
    "infinite output on stderr": (
        "stdio",
        "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
        ("output_limit",),
    ),
    "infinite output in the function": (
        "function",
        "import sys\ndef f(x):\n    while True: sys.stdout.write('x' * 10**6)",
        ("output_limit",),
    ),
    "disk filled": (
        "function",
        "with open('big', 'wb') as file:\n    while True: file.write(b'x' * 10**6)" + F,
        FULL,
    ),
    "sparse file of 1 TB": ("function", "open('big', 'wb').truncate(1 << 40)" + F, WRONG),
    "a million files": ("function", "for n in range(10**6): open(str(n), 'w')" + F, FULL),
    "big files in many folders": (
        "function",
        "import os\nfor n in range(10**3):\n    os.makedirs(f'{n}/{n}')\n"
        "    with open(f'{n}/{n}/big', 'wb') as file: file.write(b'x' * (20 << 20))" + F,
        FULL,
    ),
    "a million descriptors": ("function", "files = [open('/dev/null') for _ in range(10**6)]" + F, STOPPED),
}
GROUPS: dict[str, dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "ends its process to look well": EXITS,
    "lies about values": LIES,
    "forges messages and output": FORGERIES,
    "reads what it must not": SPYING,
    "changes what is outside": ESCAPES,
    "takes more than its share": FLOODS,
}
ATTACKS = {name: attack for group in GROUPS.values() for name, attack in group.items()}
# What the weaker kinds of sandbox do not promise (docs/sandbox.md): there these attacks find what they look for.
NOT_HELD: dict[str, set[str]] = {
    "namespaces": set(),
    "landlock": {"the host's file asked for by its name"},
    "plain": {
        "the host's file asked for by its name",
        "the host's file read",
        "the host's folders listed",
        "/proc of other processes",
        "/proc/1/mem and /proc/self/mem",
        "the test looked for in files",  # found where a checkout of this project can be read in time
    },
}
