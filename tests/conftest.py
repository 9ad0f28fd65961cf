"""
Tests, and the scripts that they start, use one thread (two are slower on tiny tensors), no network and no GPU.

Scripts run as a whole, each in a process of its own that is forked from a server with the libraries imported, which
saves seven seconds per run. .ci/run starts them the ordinary way.
"""
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="",
                  HF_HUB_DISABLE_PROGRESS_BARS="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

from tasks import Run

torch.set_num_threads(1)
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["model", "transformers.models.gpt_neox.modeling_gpt_neox", "critic"])


def run_script(script, arguments, folder, output, environment):
    """In a forked process: run `python SCRIPT ARGUMENTS` in folder, writing to output.out and output.err."""
    os.environ.update(environment)
    for descriptor, suffix in [(1, ".out"), (2, ".err")]:
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(folder)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    sys.argv = [script, *map(str, arguments)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Workplace:
    """A folder to run scripts in, with an out/ of its own that holds a briefly trained "tiny" base."""

    def __init__(self, folder):
        from model import build_tiny
        from tasks import get_task
        self.folder, self.out, self.count = folder, folder / "out", 0
        self.tiny = build_tiny(get_task("strbuild"), str(self.out / "tiny-strbuild"), steps=150, lr=0.01, width=64, layers=2,
                               heads=2)

    def start(self, script, *arguments, folder=None, environment={}):
        """Start a script; returns its .process and the files .out and .err that it writes."""
        self.count += 1
        output = str(self.folder / f"run-{self.count}")
        process = server.Process(target=run_script, args=(script, arguments, str(folder or self.folder), output, environment))
        process.start()
        return SimpleNamespace(process=process, out=Path(output + ".out"), err=Path(output + ".err"))

    def run(self, script, *arguments, folder=None, timeout=120):
        """Run a script to its end; returns its exit .code, and .out and .err as text."""
        run = self.start(script, *arguments, folder=folder)
        run.process.join(timeout)
        if run.process.exitcode is None:
            run.process.kill()
            pytest.fail(f"{script} {arguments} still ran after {timeout} s")
        return SimpleNamespace(code=run.process.exitcode, out=run.out.read_text(), err=run.err.read_text())


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(autouse=True)
def handlers():
    """Scripts that run in this process set signal handlers and their standard streams."""
    before, streams = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, (sys.stdout, sys.stderr)
    yield
    sys.stdout, sys.stderr = streams
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def inside(workplace, monkeypatch):
    """inside(script, ...) runs a script in this process, to exit code `code`; returns its global variables."""
    def inside(script, *arguments, code=0):
        workplace.count += 1
        arguments = ["--out_dir", f"inside-{workplace.count}", *arguments]  # the last --out_dir counts
        monkeypatch.chdir(workplace.folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        run, end, runs, init = {}, 0, [], Run.__init__
        monkeypatch.setattr(Run, "__init__", lambda self, *args: (runs.append(self), init(self, *args))[1])
        try:
            run = runpy.run_path(str(ROOT / script), run_name="__main__")
            run["args"].out_dir = workplace.folder / run["args"].out_dir
        except SystemExit as error:
            end = error.code or 0
        finally:
            monkeypatch.setattr(Run, "__init__", init)
            for own in runs:  # a script's end would free its lock
                vars(own).pop("lock").close() if hasattr(own, "lock") else None
        assert end == code
        return run
    return inside
