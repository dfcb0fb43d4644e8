"""Processes of their own that begin with torch imported: forked from a server that has imported it and done nothing else.

For tests of what a process leaves behind, not of how one is started: a fresh interpreter takes five seconds to import."""

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mlan.command_line", "mlan.train", "mlan.study.runner", "torch._dynamo", "sklearn.cluster"])


def _script(code: str, argv: list, told: str, environment: dict, folder: str):
    "What `python -c CODE ARGV` does in a folder, with stdout and stderr in files."
    os.setsid()
    os.chdir(folder)
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(f"{told}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(environment)
    sys.argv = ["-c", *argv]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


class Script:
    "A script that runs beside the test, in a group of its own; what it says goes to TOLD.out and TOLD.err."

    def __init__(self, code: str, *argv: str, told: Path, folder: Path = Path(), **environment: str):
        self.told = told
        for name in ("out", "err"):
            Path(f"{told}.{name}").touch()
        self.process = SERVER.Process(target=_script, args=(code, [*map(str, argv)], str(told), environment, str(folder.resolve())))
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self):
        "With all that it has started; nothing where it has ended."
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def ends(self, seconds: float = 400) -> int:  # exit status, negative for a signal
        self.process.join(seconds)
        if self.running():
            self.kill()
            raise TimeoutError(f"no end after {seconds} seconds: {self.errors[-3000:]}")
        return self.process.exitcode

    output = property(lambda self: Path(f"{self.told}.out").read_text())
    errors = property(lambda self: Path(f"{self.told}.err").read_text())
