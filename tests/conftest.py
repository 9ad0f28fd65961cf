"""
One thread (two on tiny tensors are slower), no network, no GPU, here and in every script that a test starts.

Scripts run whole, in a process of their own, forked from a server that has imported the libraries once: that saves
seven seconds a run. .ci/run starts them the ordinary way.
"""
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["transformers.models.gpt_neox.modeling_gpt_neox", "critic", "model"])


def run_script(script, arguments, folder, output):
    """What a forked process does: become `python SCRIPT ARGUMENTS` in folder, writing to output.out and output.err."""
    for descriptor, suffix in [(1, ".out"), (2, ".err")]:
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(folder)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class Workplace:
    """A folder to run scripts in, with an out/ of its own that holds a hastily trained "tiny" base."""

    def __init__(self, folder):
        from model import build_tiny
        from tasks import get_task
        self.folder, self.out, self.count = folder, folder / "out", 0
        self.tiny = build_tiny(get_task("strbuild"), str(self.out / "tiny-strbuild"), steps=60, lr=0.01, width=64,
                               layers=2, heads=2)

    def start(self, script, *arguments, folder=None):
        """Start a script; .process is its process, .out and .err are the files that it writes."""
        self.count += 1
        output = str(self.folder / f"run-{self.count}")
        process = server.Process(target=run_script, args=(script, arguments, str(folder or self.folder), output))
        process.start()
        return SimpleNamespace(process=process, out=Path(output + ".out"), err=Path(output + ".err"))

    def run(self, script, *arguments, folder=None, timeout=120):
        """Run a script to its end: .code, .out and .err as text."""
        run = self.start(script, *arguments, folder=folder)
        run.process.join(timeout)
        if run.process.exitcode is None:
            run.process.kill()
            pytest.fail(f"{script} {arguments} still ran after {timeout} s")
        return SimpleNamespace(code=run.process.exitcode, out=run.out.read_text(), err=run.err.read_text())


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("workplace"))


# Found by these tests and not mended yet: a test listed here is expected to fail, and has to leave the list when it passes.
OPEN = [
    "test_sampled_logprobs_are_the_recomputed_ones[gpt2-", "test_an_answer_that_is_cut_has_no_end_token[gpt2]",
    "test_a_row_samples_the_same_alone_and_in_company[gpt2]", "test_models_with_peculiar_masks_and_logits[",
    "test_a_demonstration_reads_like_an_episode[position-1]", "test_a_demonstration_reads_like_an_episode[score-1]",
    "test_a_demonstration_reads_like_an_episode[perfect-1]", "test_a_broken_file_is_named_with_its_line[lines7-",
    "test_options_that_make_no_sense[strbuild-options1-", "test_a_counter_goes_on_after_a_resume",
    "test_logged_numbers_do_not_depend_on_micro_batches", "test_a_run_killed_in_its_last_save_gets_its_agents",
    "test_a_run_killed_in_its_first_write_can_be_started_again", "test_eval_only_with_fewer_turns",
    "test_a_step_with_other_settings[--batch_size 1 --num_turns 1]", "nothing_is_built[--num_turns 0-",
    "nothing_is_built[--max_new_tokens -1-", "nothing_is_built[--out_dir a-model --overwrite-",
    "nothing_is_built[--out_dir a-copy --resume --overwrite-", "test_play_ends_when_an_agent_cannot_start",
]


def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.nodeid for name in OPEN):
            item.add_marker(pytest.mark.xfail(strict=True, reason="open, see OPEN in conftest.py"))
