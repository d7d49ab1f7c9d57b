"""Runs the repository's scripts in forks of one Python that has imported torch and transformers already.

Importing them takes 7 s of CPU, most of what a small run takes. A fork runs the script from its first line, as
`python script.py` does, with the caller's folder, environment, input and output, but with the threads of the server:
OMP_NUM_THREADS was read when torch was imported.

    python tests/preloaded.py serve SOCKET                  # until its parent's end of stdin closes
    python -S tests/preloaded.py run SOCKET train.py ...    # one script; its exit status
"""
import json
import os
import select
import signal
import socket
import sys
import time


def run(address, words):
    """Run a script with its arguments, words, on a server. Returns its exit status."""
    for _ in range(1200):   # two minutes: the server may still be importing
        if os.path.exists(address):
            break
        time.sleep(0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(address))
        umask = os.umask(0o077)
        os.umask(umask)
        request = {"words": words, "cwd": os.getcwd(), "environ": dict(os.environ), "umask": umask}
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], (0, 1, 2))
        connection.sendall(content)
        return int(connection.makefile().read())


def receive(connection):
    """(request, files) of one call of `run`."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    content = connection.makefile("rb").read(int.from_bytes(size, "big"))
    return json.loads(content), files


def watch(connection, child):
    """Send the child's exit status to the caller. If the caller is gone, end the child and its descendants."""
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if ended in ready:
        connection.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
    os._exit(0)


def become(request, files):
    """Take over the caller's files, folder, umask, environment and arguments."""
    for target, source in enumerate(files):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, encoding="utf-8", closefd=False, buffering=1)
                                         for n, mode in enumerate("rww"))
    sys.argv = request["words"]
    sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))


def serve(address):
    """Fork for every caller. Returns in the fork that is to run a script; ends when stdin is closed."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(f"{address}.new")
    server.listen()
    os.rename(f"{address}.new", address)   # it appears when it listens
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)   # the watching forks leave no zombies
    while True:
        ready, _, _ = select.select([server, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            request, files = receive(connection)
            child = os.fork()
            if child:
                for file in files:
                    os.close(file)
                watch(connection, child)
            os.setsid()
            connection.close()
            become(request, files)
            return
        connection.close()


def main():
    if sys.argv[1] == "run":
        sys.exit(run(sys.argv[2], sys.argv[3:]))
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import runpy

    import train  # noqa: F401  with all that it imports
    from transformers import AutoImageProcessor, ClapModel, LlavaForConditionalGeneration, LlavaProcessor  # noqa: F401
    from transformers import ClapProcessor, TimesformerModel  # noqa: F401
    serve(sys.argv[2])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
