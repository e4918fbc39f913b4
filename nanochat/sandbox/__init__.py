"""Runs programs that a model has written, or refuses to.

    from nanochat.sandbox.execute import execute_code, execute_cpp
    execute_code("def double(x): return 2 * x", checks="assert double(4) == 8").success    # True

The caller (`supervise`) starts a small launcher (`launcher`) as a process of its own. The launcher builds a world
(`world`): namespaces, and a root that holds little more than the interpreter. In there a process lays locks on itself
(`locks`, `seccomp`) and becomes the program. The caller meanwhile reads what is printed, up to a limit, watches clock
and memory, and has everything killed at the end. Whether the program did what it should is judged by a second process
that the program cannot reach (`harness`).

    namespaces   the program is alone in its world: own processes, files, no network; and all that is below
    landlock     it sees the processes and files of this machine, but opens only those that it needs
    limits       seconds, bytes and processes are limited, nothing else
    none         not even those

The launcher takes the strongest level that the kernel lets it have and refuses to go below the one that the caller
names. docs/sandbox.md says what each level holds and what it does not.
"""
