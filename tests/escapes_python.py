"""Attempts to get out of the sandbox in Python. Each prints ESCAPED when it got what it wanted.

They are harmless where nothing holds them: what they take, change or send is their own or the test's, and is bounded.
"""

PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def escaped(what=""): print("ESCAPED", what, flush=True)
def call(*arguments):
    ctypes.set_errno(0)
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    return result, ctypes.get_errno()
"""

FILES = {
    "read a private file": "SECRET in open(PRIVATE + '/secret.txt').read() and escaped()",
    "list a private folder": "os.listdir(PRIVATE) and escaped()",
    "read the list of users": "'root:' in open('/etc/passwd').read() and escaped()",
    "write a private file": "open(PRIVATE + '/new.txt', 'w').close(); escaped()",
    "append to a private file": "open(PRIVATE + '/secret.txt', 'a').write('x'); escaped()",
    "remove a private file": "os.remove(PRIVATE + '/secret.txt'); escaped()",
    "rename a private file": "os.rename(PRIVATE + '/secret.txt', PRIVATE + '/other.txt'); escaped()",
    "change a private file's mode": "os.chmod(PRIVATE + '/secret.txt', 0o600); escaped()",
    "truncate a private file": "os.truncate(PRIVATE + '/secret.txt', 1); escaped()",
    "a symbolic link to a private file": "os.symlink(PRIVATE + '/secret.txt', 'link'); open('link').read(); escaped()",
    "a hard link to a private file": "os.link(PRIVATE + '/secret.txt', 'hard'); open('hard').read(); escaped()",
    "dots to a private file": "open('../' * 20 + PRIVATE + '/secret.txt').read(); escaped()",
    "a private file by a process's root": "open(f'/proc/{os.getppid()}/root' + PRIVATE + '/secret.txt'); escaped()",
    "a private file by a system call": "call(257, -100, (PRIVATE + '/secret.txt').encode(), 0)[0] >= 0 and escaped()",
    "change the standard library": "open(os.__file__, 'a').close(); escaped()",
    "a file in shared memory": "name = '/dev/shm/nanochat_test'; open(name, 'w').close(); os.remove(name); escaped()",
    "a device of the machine": "open('/dev/full', 'w').close(); escaped()",
}

PROGRAMS = {
    "reload os and call a shell": "import importlib; os.system = None; importlib.reload(os).system('echo ESCAPED')",
    "a shell by posix": "import posix; posix.system('echo ESCAPED')",
    "a shell by posix_spawn": "os.waitpid(os.posix_spawn('/bin/sh', ['sh', '-c', 'echo ESCAPED'], {}), 0)",
    "a shell by subprocess": "import subprocess; subprocess.run(['/bin/sh', '-c', 'echo ESCAPED'])",
    "become a shell": "os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "a shell by the C library": "libc.system(b'echo ESCAPED')",
    "root's user": "os.setuid(0); os.getuid() == 0 and escaped()",
    "root's rights": "os.chown(PRIVATE, os.getuid(), os.getgid()); escaped()",
}

NETWORK = {
    "connect to a server": "import socket; socket.create_connection(('127.0.0.1', PORT), 2); escaped()",
    "send a datagram": "import socket; socket.socket(type=2).sendto(b'x', ('127.0.0.1', UDP_PORT)); escaped()",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0)); escaped()",
    "a socket of any family": """
import socket
for family in range(46):
    for kind in (1, 2, 3, 5):
        try: socket.socket(family, kind).close(); escaped(family)
        except OSError: pass
""",
    "a pair of sockets": "import socket; socket.socketpair(); escaped()",
    "a socket by a system call": "call(41 if os.uname().machine == 'x86_64' else 198, 2, 1, 0)[0] >= 0 and escaped()",
    "interfaces besides the loopback": "import socket; len(socket.if_nameindex()) > 1 and escaped()",
}

PROCESSES = {
    "the caller's memory": "open(f'/proc/{CALLER}/mem', 'rb'); escaped()",
    "the caller's environment": "open(f'/proc/{CALLER}/environ', 'rb').read() and escaped()",
    "the caller's open files": "os.listdir(f'/proc/{CALLER}/fd') and escaped()",
    "the own environment": "'NANOCHAT_TEST_SECRET' in os.environ and escaped()",
    "inherited open files": """
for file in range(3, 200):
    try: SECRET.encode() in os.pread(file, 100, 0) and escaped(file)
    except OSError: pass
""",
    "find out whether a process exists": """
try: os.kill(VICTIM, 0)
except PermissionError: pass
except ProcessLookupError: sys.exit()
escaped()
""",
    "a signal to the caller": "os.kill(CALLER, 0); escaped()",
    "end another process": "os.kill(VICTIM, 9); escaped()",
    "end another process by pidfd": """
file = call(434, VICTIM, 0)[0]
file >= 0 and call(424, file, 9, None, 0)[0] == 0 and escaped()
""",
    "trace another process": "call(101, 16, VICTIM, 0, 0)[0] == 0 and escaped()",
    "read another process's memory": """
buffer = (ctypes.c_ulong * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
call(310, VICTIM, buffer, 1, buffer, 1, 0)[1] in (0, 14) and escaped()
""",
    "another process's priority": "os.setpriority(os.PRIO_PROCESS, VICTIM, 5); escaped()",
    "another process's limits": "import resource; resource.prlimit(VICTIM, resource.RLIMIT_NOFILE); escaped()",
    "another process's processors": "os.sched_setaffinity(VICTIM, os.sched_getaffinity(VICTIM)); escaped()",
    "raise the own limits": """
import resource
unlimited = (resource.RLIM_INFINITY,) * 2
resource.setrlimit(resource.RLIMIT_CPU, unlimited); escaped()
""",
    "a core file": """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
child = os.fork()
child or os.abort()
os.WCOREDUMP(os.waitpid(child, 0)[1]) and escaped()
""",
    "wait for input": "input() and escaped()",
    "a child that survives": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time; time.sleep(1); open(PRIVATE + '/survived', 'w').close(); time.sleep(5)
    os._exit(0)
escaped()
""",
}

# Refused calls: name, number, arguments that do nothing where they are allowed. What counts is the kind of refusal.
CALLS = """
ptrace 101 -1 0 0 0, mount 165 1 1 1 0 0, umount2 166 1 0, pivot_root 155 1 1, chroot 161 1, setns 308 -1 0,
unshare 272 0, keyctl 250 -1 0 0 0 0, add_key 248 1 1 0 0 0, request_key 249 1 1 1 0, bpf 321 -1 0 0,
userfaultfd 323 -1, io_uring_setup 425 0 0, io_uring_enter 426 -1 0 0 0 0 0, perf_event_open 298 1 0 -1 -1 0,
kexec_load 246 0 0 0 -1, init_module 175 1 1 1, finit_module 313 -1 1 0, delete_module 176 1 0,
reboot 169 0 0 0 0, process_vm_writev 311 -1 0 0 0 0 1, kcmp 312 -1 -1 0 0 0, swapon 167 1 0,
settimeofday 164 1 1, sethostname 170 1 -1, fanotify_init 300 -1 -1, open_by_handle_at 304 -1 1 0,
memfd_create 319 1 0, memfd_secret 447 -1, shmget 29 -1 0 0, mq_open 240 1 0 0 0, acct 163 1, clone3 435 0 0,
open_tree 428 -1 1 0, fsopen 430 1 0, mount_setattr 442 -1 1 0 0 0, pidfd_getfd 438 -1 0 0,
process_madvise 440 -1 0 0 0 0, personality 135 4294967295
"""

BOMBS = {
    "processes without end": """
import time
count = 0
while count < 150:
    if os.fork() == 0: time.sleep(2); os._exit(0)
    count += 1
escaped(count)
""",
    "threads without end": """
import threading, time
for count in range(150): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
escaped()
""",
    "memory": "len(bytearray(400_000_000)) and escaped()",
    "memory that is shared": "import mmap; mmap.mmap(-1, 400_000_000); escaped()",
    "memory of many processes": """
import time
for child in range(5):
    if os.fork() == 0:
        held = bytearray(80_000_000)
        for place in range(0, len(held), 4096): held[place] = 1
        time.sleep(2.5); os._exit(0)
time.sleep(2)
escaped()
""",
    "a large file": """
with open('large', 'wb') as file:
    for _ in range(100): file.write(bytes(2**20)); file.flush()
escaped()
""",
    "many files that are large together": """
for number in range(10):
    with open(f'part{number}', 'wb') as file: file.write(bytes(10 * 2**20))
escaped()
""",
    "many files": """
for number in range(6000): open(f'file{number}', 'w').close()
escaped()
""",
    "a million open files": "files = [os.open('/dev/null', os.O_RDONLY) for _ in range(500)]; escaped()",
    "locked memory": "page = ctypes.create_string_buffer(2**20); libc.mlock(page, 2**20) == 0 and escaped()",
}

# Programs that do not solve their task (`CHECKS`) and want to be believed all the same.
CHECKS = "assert double(4) == 8\nassert double(-1) == -2"
LIARS = {
    "leave with 0": "os._exit(0)",
    "leave with 0, in order": "sys.exit(0)",
    "leave by an exception": "raise SystemExit",
    "leave with 0 when called": "def double(x): os._exit(0)",
    "leave with 0 from a thread": "import threading; threading.Thread(target=os._exit, args=(0,)).start()",
    "become a program that leaves with 0": "os.execv(sys.executable, [sys.executable, '-c', ''])",
    "write success at the end": "import atexit; atexit.register(lambda: print('success', flush=True)); double = str",
    "equal everything": """
class Yes(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def double(x): return Yes(0)
""",
    "no assertion fails": """
import builtins
class AssertionError(BaseException): pass
builtins.AssertionError = AssertionError
double = lambda x: None
""",
    "replace what checks call": """
import builtins
builtins.__build_class__ = builtins.compile = builtins.exec = lambda *a, **k: None
abs = len = int = bool = lambda *a: True
double = lambda x: None
""",
    "break the checks off": "def double(x): raise KeyboardInterrupt",
    "spray guesses over all open files": """
import secrets
for file in range(256):
    for guess in (b'1', b'True', secrets.token_hex(32).encode(), bytes(16)):
        try: os.write(file, guess)
        except OSError: pass
os._exit(0)
""",
    "look for the sentinel and write it": r"""
import gc, re
seen = []
frame = sys._getframe()
while frame:
    seen += [*frame.f_locals.values(), *frame.f_globals.values()]; frame = frame.f_back
for value in gc.get_objects():
    seen += value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
texts = [value.encode() if type(value) is str else value for value in seen if type(value) in (str, bytes)]
for place in ('/proc/self/environ', '/proc/self/mem', '/proc/1/environ', f'/proc/{os.getppid()}/environ'):
    try: texts.append(open(place, 'rb').read(10**6))
    except OSError: pass
for file in range(3, 64):
    for read in (lambda: os.pread(file, 4096, 0), lambda: os.set_blocking(file, False) or os.read(file, 4096)):
        try: texts.append(read())
        except OSError: pass
found = {guess for text in texts if text for guess in re.findall(b'(?=([0-9a-f]{64}))', text)}
os.write(1, b'many texts: ' * (len(texts) > 1000) + b' '.join(found))
for guess in found:
    for file in range(256):
        try: os.write(file, guess)
        except OSError: pass
os._exit(0)
""",
    "answer for the harness": """
frame = sys._getframe()
while frame and 'self' not in frame.f_locals: frame = frame.f_back
harness = frame.f_locals['self']
question, arguments, named = harness.receive()
harness.send(arguments[0])
while True:
    harness.receive(); harness.send(('value', True))
""",
    "tell the judge of an error without a name": """
frame = sys._getframe()
while frame and 'self' not in frame.f_locals: frame = frame.f_back
harness = frame.f_locals['self']
harness.receive()
harness.send(('raised', [''], ''))
harness.receive()
""",
    "send the judge a program": """
import pickle
class Payload:
    def __reduce__(self): return print, ('ESCAPED',)
frame = sys._getframe()
while frame and 'self' not in frame.f_locals: frame = frame.f_back
harness = frame.f_locals['self']
question, arguments, named = harness.receive()
harness.send(arguments[0])
harness.receive()
sent = [b'["eval", "print(\'ESCAPED\')"]', b'["builtins.print", "ESCAPED"]', pickle.dumps(Payload())]
harness._writing.write(b'\\n'.join(sent) + b'\\n'); harness._writing.flush()
harness.receive()
""",
    "a message without end": """
frame = sys._getframe()
while frame and 'self' not in frame.f_locals: frame = frame.f_back
harness = frame.f_locals['self']
while True: harness._writing.write(bytes(2**20))
""",
    "a message without bottom": """
frame = sys._getframe()
while frame and 'self' not in frame.f_locals: frame = frame.f_back
harness = frame.f_locals['self']
harness._writing.write(b'[' * 10**6 + b'\\n'); harness._writing.flush()
harness.receive()
""",
    "end the judge": "os.kill(os.getppid(), 9)",
    "interrupt the judge": "import signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.2); os._exit(0)",
}
