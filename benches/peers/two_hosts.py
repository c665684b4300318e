"""Two hosts, network namespaces of this machine with a slow link between them, and programs that run there: for the scripts beside this one."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import tempfile
import time

HOSTS = pathlib.Path(__file__).resolve().parents[2] / "tests" / "hosts"
NAME = "plbench"
SECONDS = 900  # the most one program may take
GRACE = 10  # seconds for a program to end in
ENDS = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def hosts(rate):
    """The two hosts, removed at the end with what still runs there."""
    # A signal waits until there is something whole to remove, or until it is removed.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    made = subprocess.run([HOSTS / "up", NAME, rate], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{HOSTS / 'up'} failed: {made.stderr.strip()}")
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        for host in (1, 2):
            # Of a launcher that was killed, for example.
            left = subprocess.run(["ip", "netns", "pids", f"{NAME}{host}"], capture_output=True, text=True)
            for pid in left.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        subprocess.run([HOSTS / "down", NAME], check=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)


def run(commands, **variables):
    """Runs programs at once to their ends; the words of the first that fails, which ends the others."""
    with contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            # Not a pipe, which would have to be read.
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT, env={**os.environ, **variables})
            stack.callback(stop, process)
            started.append((process, output))
        deadline = time.monotonic() + SECONDS
        while True:
            running = [process for process, _ in started if process.poll() is None]
            for process, output in started:
                if process.returncode:
                    output.seek(0)
                    raise SystemExit(f"{' '.join(process.args)} failed: {output.read().strip()[-2000:]}")
            if not running:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(running[0].args)} took more than {SECONDS} s")
            time.sleep(0.1)


def stop(process):
    """Ends a program, if it runs, so that it can end what it has started."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def times(out):
    """Medians over the steps after the first, which allocates: milliseconds of a step, and of waiting. Removes the run, whose checkpoint is large."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    shutil.rmtree(out)
    return [statistics.median(line[key] for line in lines) for key in ("step_ms", "exposed_ms")]
