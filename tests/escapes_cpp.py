"""Attempts to get out of the sandbox with a C++ program: of its source while it is compiled, and of what it does.

SECRET_FILE and the like are replaced by the test's own. A source gets something if the private text is anywhere in what
comes back; a program if it prints ESCAPED.
"""

PRELUDE = """
#include <arpa/inet.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <iostream>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>
static void escaped_if(bool it_did) { if (it_did) { puts("ESCAPED"); fflush(stdout); } }
"""

SOURCES = {
    "include a private file": '#include "SECRET_FILE"\nint main() {}',
    "include it as a text": 'const char *text =\n#include "SECRET_FILE"\n;\nint main() {}',
    "include it by a macro": "#define FILE_ <SECRET_FILE>\n#include FILE_\nint main() {}",
    "include it by dots": '#include "../../../../../../..SECRET_FILE"\nint main() {}',
    "assemble it in": """
#include <cstdio>
asm(".section .rodata\\nsecret: .incbin \\"SECRET_FILE\\"\\nsecret_end: .byte 0\\n.text");
extern const char secret[], secret_end[];
int main() { fwrite(secret, 1, secret_end - secret, stdout); }
""",
    "assemble it as a source": 'asm(".include \\"SECRET_FILE\\"");\nint main() {}',
    "embed it": """
#include <cstdio>
const unsigned char text[] = {
#embed "SECRET_FILE"
};
int main() { fwrite(text, 1, sizeof text, stdout); }
""",
    "ask whether it exists": """
#include <cstdio>
#if __has_include("SECRET_FILE")
int main() { puts("the private text"); }
#else
int main() {}
#endif
""",
}

# Flags are the caller's and not the program's; these would be harmful ones. Each prints ESCAPED where it can.
FLAGS = {
    "a linker script": ("int main() {}", "-Wl,-M,PRIVATE/script.ld"),
    "a response file": ("int main() {}", "@SECRET_FILE"),
    "a file that is included first": ("int main() {}", "-include", "SECRET_FILE"),
    "a program in the place of the compiler": ("int main() {}", "-wrapper", "/bin/sh,-c,cat SECRET_FILE >&2"),
}

# How the compiler's own time, memory and files are used up. None of it may come to an end.
COMPILE_BOMBS = {
    "templates": """
template <long N, long M> struct Two {
    static const long value = Two<N - 1, M>::value + Two<N - 1, M + (1L << N)>::value;
};
template <long M> struct Two<0, M> { static const long value = M & 1; };
int main() { return Two<28, 0>::value == 0; }
""",
    "constant expressions": """
constexpr long slow(long n) {
    for (long i = 0; i < 40; i++) for (long j = 0; j < 200'000; j++) n += j;
    return n;
}
template <long N> struct Slow { static const long value = slow(N) + Slow<N - 1>::value; };
template <> struct Slow<0> { static const long value = 0; };
int main() { return Slow<100>::value == 0; }
""",
    "a file that includes itself": '#include "program.cpp"\n#include "program.cpp"\nint main() {}',
    "macros": "".join(f"#define A{n + 1} A{n} A{n} A{n} A{n} A{n} A{n} A{n} A{n}\n" for n in range(12)).replace(
        "A0 ", "+1 "
    )
    + "int main() { return 0 A12; }",
    "a binary of a gigabyte": "char large[1 << 30] = {1};\nint main() { return large[5]; }",
    "a binary of a terabyte": 'asm(".data\\n.fill 0x10000000000, 1, 1\\n.text");\nint main() {}',
    "a gigabyte by the assembler": 'asm(".data\\n.rept 100000000\\n.quad 1\\n.endr\\n.text");\nint main() {}',
}

PROGRAMS = {
    "read a private file": 'escaped_if(bool(std::ifstream("SECRET_FILE")));',
    "write a private file": 'escaped_if(bool(std::ofstream("PRIVATE/new.txt")));',
    "remove a private file": 'escaped_if(remove("SECRET_FILE") == 0);',
    "a link to a private file": 'escaped_if(symlink("SECRET_FILE", "link") == 0 && open("link", O_RDONLY) >= 0);',
    "the caller's memory": 'escaped_if(open("/proc/CALLER/mem", O_RDONLY) >= 0);',
    "end another process": "escaped_if(kill(VICTIM, SIGKILL) == 0);",
    "trace another process": "escaped_if(ptrace(PTRACE_ATTACH, VICTIM, 0, 0) == 0);",
    "a shell": 'escaped_if(system("true") == 0);',
    "become a shell": 'execl("/bin/sh", "sh", "-c", "echo ESCAPED", nullptr);',
    "connect to a server": """
sockaddr_in address = {}; address.sin_family = AF_INET; address.sin_port = htons(PORT);
inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
escaped_if(connect(socket(AF_INET, SOCK_STREAM, 0), (sockaddr *)&address, sizeof address) == 0);
""",
    "a socket of any family": """
for (int family = 0; family < 46; family++)
    for (int kind : {1, 2, 3, 5}) escaped_if(socket(family, kind, 0) >= 0);
""",
    "inherited open files": """
char text[64] = {};
for (int file = 3; file < 200; file++) escaped_if(pread(file, text, 63, 0) > 0 && strstr(text, "private"));
""",
    "the own environment": 'escaped_if(getenv("NANOCHAT_TEST_SECRET"));',
    "wait for input": "std::string line; escaped_if(bool(std::getline(std::cin, line)));",
    "root's user": "escaped_if(setuid(0) == 0);",
    "raise the own limits": "rlimit none = {~0ul, ~0ul}; escaped_if(setrlimit(RLIMIT_CPU, &none) == 0);",
    "a namespace": "escaped_if(syscall(SYS_unshare, 0) == 0);",
}
X86_PROGRAMS = {  # calls past the table of x86-64; where they are not refused they only ask for the process's number
    "a call of the 32-bit table": """
long result; asm volatile("int $0x80" : "=a"(result) : "a"(20) : "memory"); escaped_if(result > 0);
""",
    "a call of the x32 table": "escaped_if(syscall(0x40000000 + SYS_getpid) > 0 || errno == ENOSYS);",
}
RUN_BOMBS = {
    "processes without end": """
for (int count = 0; count < 150; count++) {
    int child = fork();
    if (child < 0) return 1;
    if (child == 0) { sleep(2); _exit(0); }
}
escaped_if(true);
""",
    "threads without end": """
for (int count = 0; count < 150; count++) std::thread([] { sleep(1); }).detach();
escaped_if(true);
""",
    "memory": """
volatile char *held = new char[400'000'000];
for (long place = 0; place < 400'000'000; place += 4096) held[place] = 1;
escaped_if(held[0]);
""",
    "a large file": """
std::ofstream file("large"); std::vector<char> part(1 << 20);
for (int count = 0; count < 100; count++) file.write(part.data(), part.size());
file.flush(); escaped_if(bool(file));
""",
}

# Programs that fail, and want to be believed all the same.
LIARS = {
    "leave before main": "static int early = (_exit(0), 0);\nint main() { return 1; }",
    "leave with 0": "int main() { exit(0); }",
    "leave with 0 at once": "int main() { quick_exit(0); }",
    "leave with 0 by a handler": "int main() { signal(SIGUSR1, [](int) { _exit(0); }); raise(SIGUSR1); return 1; }",
    "become another program": 'int main() { execl("/usr/bin/g++", "g++", "--version", nullptr); _exit(0); }',
    "leave from a thread": "int main() { std::thread([] { _exit(0); }).join(); return 1; }",
    "leave with 0 after main has failed": "int main() { atexit([] { _exit(0); }); return 1; }",
    "crash after main": "struct Late { ~Late() { abort(); } } late;\nint main() { return 0; }",
    "spray guesses over all open files": """
int main() {
    for (int file = 0; file < 256; file++)
        for (const char *guess : {"1", "true", "success"}) write(file, guess, strlen(guess));
    _exit(0);
}
""",
    "be the harness": 'extern "C" int __wrap_main(int, char **, char **) { return 0; }\nint main() { return 1; }',
    "start in its own way": 'extern "C" void _start() { _exit(0); }\nint main() { return 1; }',
}
