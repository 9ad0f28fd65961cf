"""Training runs of a few seconds: what they compute, by hand; seeds, interruptions, kills, ranks and invalid input."""
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_model import FAMILIES, make_folder

import model
from model import LanguageModel
from tasks import Episode, InputError, Run, StrBuild, Turn, dialogue, get_task, history

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train_cc.py", "train_dc.py", "train_mc.py"]
SMALL = ["--device", "cpu", "--batch_size", 4, "--num_turns", 2, "--max_new_tokens", 24, "--lora_rank", 4, "--seed", 8,
         "--group_size", 2, "--data", "words.jsonl"]
KEYS = {"eval": "step joint_actions eval/score eval/reward eval/return eval/turns eval/coverage", "train": """
    step episodes joint_actions tokens wall_s train/return train/reward train/score train/turns train/response_tokens
    train/truncated loss/policy value/explained_variance value/explained_variance_by_turn policy/entropy policy/grad_norm
    time/rollout_s time/update_s memory_gb inputs/truncated"""}


@pytest.fixture(scope="session")
def place(workplace):
    words = [{"string": word} for word in ["I", "L", "T", "MC", "1"]]
    words += [{"string": word, "split": "eval"} for word in ["IC", "LI", "CL", "M", "LLM", "2"]]
    (workplace.folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in words))
    return workplace


@pytest.fixture
def inside(inside, place):
    """The small run of this file, in this process; see conftest.py."""
    return lambda script, *arguments, **code: inside(script, *SMALL, *arguments, **code)


@pytest.fixture(scope="session")
def whole(place):
    """whole(script): the folder of an undisturbed run of four steps, made once; no test writes into it."""
    made = {}

    def whole(script):
        if script not in made:
            run = place.run(script, *SMALL, "--out_dir", "whole-" + script, "--steps", 4)
            assert run.code == 0, run.err[-2000:]
            made[script] = place.folder / ("whole-" + script)
        return made[script]
    return whole


@pytest.fixture
def copy_of(place, whole, tmp_path):
    """copy_of(script): a copy of whole(script) to write into."""
    return lambda script="train_cc.py": Path(shutil.copytree(whole(script), tmp_path / "copy" / script))


def log_of(folder):
    """The lines of log.jsonl without times and memory."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("wall_s", "time/", "memory"))} for line in lines]


def train_lines(folder):
    return [line for line in log_of(folder) if "train/reward" in line]


def weights_of(folder):
    return {f"{file.parent.name}/{key}": value for file in sorted(folder.glob("*/adapter_model.safetensors"))
            for key, value in load_file(file).items()}


def state_of(folder):
    return torch.load(folder / "train_state.pt", weights_only=True)


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(one, two):
    """Bit for bit, but for times and memory."""
    assert log_of(one) == log_of(two)
    assert all((one / name).read_text() == (two / name).read_text() for name in ("samples.txt", "samples.jsonl"))
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    ours, theirs = weights_of(one), weights_of(two)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = state_of(one), state_of(two)
    assert ours["rng"] == theirs["rng"] and torch.equal(ours["generator"], theirs["generator"])


# --- three scripts, one skeleton --------------------------------------------------------------------------------------

def test_a_diff_of_two_scripts_is_the_algorithm():
    for script, most in zip(SCRIPTS[1:], (25, 100)):
        diff = subprocess.run(["diff", "train_cc.py", script], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
        changed = len(re.findall("^[<>]", diff, re.M))
        print(f"\ndiff train_cc.py {script}: {changed} changed lines")
        assert changed <= most
    texts = [(ROOT / script).read_text() for script in SCRIPTS]
    rulers = [re.findall(r"^# --- (.+?) -+$", text, re.M) for text in texts]
    assert rulers[0] == rulers[1] and rulers[2] == [ruler for ruler in rulers[0] if ruler != "critics"]


@pytest.mark.parametrize("script, critics", list(zip(SCRIPTS, [["critic"], ["critic_0", "critic_1"], []])))
def test_a_run_writes_what_it_promises(script, critics, whole):
    folder = whole(script)
    files = {".lock", "config.json", "log.jsonl", "samples.txt", "samples.jsonl", "report.html", "train_state.pt", "agent_0",
             "agent_1", *critics}
    assert {*os.listdir(folder)} == files
    config = json.loads((folder / "config.json").read_text())
    assert config["batch_size"] == 4 and config["lr"] == StrBuild.lr and config["versions"]["torch"] == version("torch")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4] and lines[0]["joint_actions"] == 0
    for line, kind in zip(lines, ["eval", *["train"] * 4, "eval"]):
        assert line.keys() >= {*KEYS[kind].split()} and ("loss/value" in line) == (kind == "train" and critics != [])
        assert line == line and not any(value != value for value in line.values())  # no NaN
    assert all(line["policy/grad_norm"] > 0 for line in lines[1:5]), "the stand-in is too bad for these tests"
    assert lines[-1]["episodes"] == 16 and 16 < lines[-1]["joint_actions"] <= 32 and lines[-1]["inputs/truncated"] == 0
    assert log_of(folder)[0] == log_of(whole(SCRIPTS[0]))[0]  # the same untrained team
    assert (folder / "samples.txt").read_text().count("=== step 4, ") == 4
    weights = weights_of(folder)
    moved = [{key.split("/", 1)[1]: x for key, x in weights.items() if key.startswith(name + "/") and "lora_B" in key}
             for name in ("agent_0", "agent_1", *critics)]
    assert len(moved[0]) > 7 and all(x.abs().max() > 0 for own in moved for x in own.values())
    assert not any(torch.equal(x, moved[1][key]) for key, x in moved[0].items())


@pytest.mark.skipif("NANOCOLLM_MODEL" not in os.environ, reason="NANOCOLLM_MODEL names no folder of a pretrained model")
def test_two_steps_of_a_pretrained_model(workplace):
    small = "--task tldr --steps 2 --batch_size 4 --group_size 2 --eval_items 2 --max_new_tokens 48 --out_dir pretrained"
    run = workplace.run("train_cc.py", "--model", Path(os.environ["NANOCOLLM_MODEL"]).resolve(), *small.split(), timeout=3600)
    assert run.code == 0, run.err[-2000:]
    lines = train_lines(workplace.folder / "pretrained")
    assert [line["step"] for line in lines] == [1, 2] and all(0 < line["policy/entropy"] < 6 for line in lines)


# --- one step by hand -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_advantages_are_td_errors_of_the_right_critic(script, inside):
    """V is what each critic said before it learned from the step: the mean return of the turn, in the first one."""
    run = inside(script, "--steps", 1, "--passes", 1, "--minibatches", 1, "--micro_batch", 3)
    episodes, palettes, losses, errors = run["episodes"], run["task"].palettes, [], []
    returns = [[e.rewards[0] + 0.9 * e.rewards[1], e.rewards[1]] for e in episodes]
    V = [sum(ret[t] for ret in returns) / 4 for t in range(2)] + [0]
    std = torch.tensor(returns).std(0, correction=0).clamp(min=0.1).tolist()
    for e in episodes:
        for t, turn in enumerate(e.turns):
            assert turn.values == pytest.approx([V[t]] * len(run["critics"]), abs=1e-5)
            errors.append(e.rewards[t] + 0.9 * V[t + 1] - V[t])
            losses.append((errors[-1] / std[t]) ** 2)
            texts = [run["lms"][0].tokenizer.decode(ids) for ids in turn.critic_inputs]
            shown = [[i for i in range(2) if f"with {' '.join(palettes[i])}" in text] for text in texts]
            assert shown == ([[0, 1]] if script == "train_cc.py" else [[0], [1]])
    errors = torch.tensor(errors)
    ours = torch.tensor([turn.advantages for e in episodes for turn in e.turns])
    assert torch.allclose(ours, ((errors - errors.mean()) / errors.std(correction=0))[:, None].expand(-1, 2), atol=1e-4)
    assert run["stats"]["loss/value"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    now = [critic([turn.critic_inputs[c] for turn in episodes[0].turns], [0, 1]) for c, critic in enumerate(run["critics"])]
    assert all((values - torch.tensor(V[:2])).abs().max() > 1e-5 for values in now)  # they have learned since


def test_each_agent_has_the_advantage_of_its_own_critic(inside):
    run = inside("train_dc.py", "--steps", 1)
    for critic, bias in zip(run["critics"], (0.5, -2.0)):  # apart
        torch.nn.init.constant_(critic.head.bias, bias)
        torch.nn.init.zeros_(critic.head.weight)
    for turn in [turn for e in run["episodes"] for turn in e.turns]:
        turn.values, turn.targets, turn.advantages = [], [], []
    run["set_advantages"](run["episodes"])
    (m0, m1), (s0, s1) = run["critics"][0].mean.tolist(), run["critics"][0].std.tolist()
    raw = torch.tensor([[e.rewards[0] + 0.9 * (m1 + b * s1) - (m0 + b * s0) for b in (0.5, -2.0)] if t == 0 else
                        [e.rewards[1] - (m1 + b * s1) for b in (0.5, -2.0)] for e in run["episodes"] for t in range(2)])
    ours = torch.tensor([turn.advantages for e in run["episodes"] for turn in e.turns])
    assert torch.allclose(ours, (raw - raw.mean()) / raw.std(correction=0), atol=1e-4)


@pytest.mark.parametrize("baseline", ["group", "loo", "none"])
def test_monte_carlo_advantages_by_hand(baseline, inside):
    episodes = inside("train_mc.py", "--steps", 1, "--baseline", baseline)["episodes"]
    assert [e.item for e in episodes[::2]] == [e.item for e in episodes[1::2]]
    returns = torch.tensor([[e.rewards[0] + 0.9 * e.rewards[1], e.rewards[1]] for e in episodes]).view(2, 2, 2)
    raw = returns - {"group": returns.mean(1, keepdim=True), "loo": returns.flip(1), "none": 0}[baseline]
    ours = torch.tensor([turn.advantages for e in episodes for turn in e.turns])
    assert torch.allclose(ours, (raw / raw.square().mean().sqrt()).view(-1, 1).expand(-1, 2), atol=1e-4)
    assert (baseline == "none") == bool((raw < 0).all())  # rewards are negative: nothing to compare with


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_actors_gradient_and_clipped_loss_by_hand(script, inside):
    """A first minibatch has the gradient of - mean A log pi; then agents are moved so far that clipping matters."""
    run = inside(script, "--steps", 1, "--passes", 1, "--minibatches", 1, "--micro_batch", 3, "--temperature", 0.7)
    lm, turns, ours = run["lms"][0], [turn for e in run["episodes"] for turn in e.turns], run["actor_parameters"]

    def answers(i):
        """Of every answer of agent i: each token's log pi now and when it was sampled, and its advantage."""
        for turn in turns:
            logp, _ = lm.logprobs(f"agent_{i}", [turn.prompts[i]], [turn.tokens[i]], 0.7)
            yield logp, torch.tensor(turn.logps[i]), turn.advantages[i]

    for key, p in lm.causal_lm.named_parameters():
        p.data *= 0.0 if "lora_B" in key else 1.0  # as before the step, which moved nothing else
    for i in range(2):
        rows = list(answers(i))
        assert all(torch.allclose(logp, sampled, atol=1e-4) for logp, sampled, _ in rows)
        (-sum(advantage * logp.sum() for logp, _, advantage in rows) / (2 * len(turns))).backward()
    gradient = torch.cat([p.grad.flatten() for p in ours])
    state = run["actor_optimizer"].state
    moment = torch.cat([state[p]["exp_avg"].flatten() for p in ours]) / 0.1  # Adam's first: the gradient, clipped to norm 1
    assert run["stats"]["policy/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
    assert torch.allclose(moment, gradient / max(1, gradient.norm()), atol=1e-4)
    run["actor_optimizer"].zero_grad()
    torch.manual_seed(0)
    for p in ours:
        p.data += 0.1 * torch.randn_like(p)
    for turn in turns:
        turn.advantages = [turn.advantages[0], -turn.advantages[1] / 2]  # to each agent its own
    expected, kinds = 0.0, set()
    for logp, sampled, advantage in [row for i in range(2) for row in answers(i)]:
        for ratio in (logp - sampled).exp().tolist():  # clipped only in the direction that the advantage rewards
            used = min(ratio, 1.2) if advantage > 0 else max(ratio, 0.8)
            expected -= used * advantage / (2 * len(turns))
            kinds.add((advantage > 0, ratio > 1.2, ratio < 0.8))
    assert len(kinds) == 6, "this test wants ratios on both sides of both bounds"
    assert run["update_actors"](run["episodes"])["loss/policy"] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_of_equal_returns_moves_no_actor(script, inside, monkeypatch):
    """Also after a step in which they differed, when Adam's momentum alone would move them."""
    judge_all, save, saved = StrBuild.judge_all, Run.save, []

    def judge(self, items, answers, turn, worlds):
        outcomes = judge_all(self, items, answers, turn, worlds)
        for outcome, item in zip(outcomes, items) if saved else []:  # a turn's own reward, but every episode's
            outcome.reward = -1.3 - 0.7 * turn - (ord(item["string"][0]) / 70 if script == "train_mc.py" else 0)
        return outcomes  # Monte Carlo compares the three episodes on an item: items may differ

    monkeypatch.setattr(StrBuild, "judge_all", judge)
    monkeypatch.setattr(Run, "save", lambda run, state: (saved.append(state["adapters"]), save(run, state)))
    lines = train_lines(inside(script, *"--steps 3 --save_every 1 --batch_size 6 --group_size 3".split())["args"].out_dir)
    assert lines[0]["policy/grad_norm"] > 0 and [line["policy/grad_norm"] for line in lines[1:]] == [0, 0]
    actors = [key for key in saved[0] if ".agent_" in key]
    assert len(actors) >= 16 and any(saved[0][key].any() for key in actors if "lora_B" in key)
    assert all(torch.equal(saved[0][key], later[key]) for later in saved[1:] for key in actors)
    assert all(not torch.equal(saved[0][key], saved[2][key]) for key in saved[0] if ".critic" in key and "lora_B" in key)


def test_micro_batches_change_memory_but_not_the_gradient(inside):
    """One optimizer step: Adam's first moment is the (clipped) gradient itself."""
    gradients, lines = [], []
    for size in (1, 2, 8):
        run = inside("train_cc.py", "--steps", 1, "--passes", 1, "--minibatches", 1, "--micro_batch", size)
        gradients.append([torch.cat([p["exp_avg"].flatten() for p in run[name].state.values()]) for name in (
            "actor_optimizer", "critic_optimizer")])
        lines.append(train_lines(run["args"].out_dir)[0])
        lines[-1].update(enumerate(lines[-1].pop("value/explained_variance_by_turn")))
    for others in gradients[1:]:
        for ours, theirs in zip(others, gradients[0], strict=True):
            assert ours.norm() > 0 and (ours - theirs).norm() < 1e-4 * theirs.norm()
        assert lines.pop() == pytest.approx(lines[0], rel=1e-3, abs=1e-5)


def test_an_episode_that_is_solved_goes_no_further(inside, monkeypatch):
    run, judge_all = inside("train_cc.py", "--steps", 0), StrBuild.judge_all

    def generous(self, items, *rest):
        outcomes = judge_all(self, items, *rest)
        for item, outcome in zip(items, outcomes):
            outcome.done = item["string"] == "I"
        return outcomes

    monkeypatch.setattr(StrBuild, "judge_all", generous)
    ours, both = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    assert [len(e.turns) for e in run["rollout"]([{"string": "I"}, {"string": "L"}], torch.Generator())] == [1, 2]
    assert len(run["rollout"]([{"string": "I"}], ours)[0].turns) == 1
    torch.rand(2, 2, 24, generator=both)
    assert torch.equal(ours.get_state(), both.get_state())  # as many draws as those of a rank that plays on


def test_agents_of_different_models(inside, tmp_path, monkeypatch):
    judge_all = StrBuild.judge_all
    monkeypatch.setattr(StrBuild, "judge_all", lambda self, items, answers, *rest: [  # random models build nothing
        replace(outcome, reward=len(texts[0]) / 99) for outcome, texts in zip(judge_all(self, items, answers, *rest), answers)])
    monkeypatch.setattr(StrBuild, "instructions", lambda self, agent: "Build.")  # the true rules do not fit into 512 tokens
    folders = [make_folder(tmp_path / name, *FAMILIES[name]) for name in ("Qwen3", "GPT-2")]
    run = inside("train_dc.py", "--model", ",".join(folders), "--steps", 1, "--critic_tokens", 8, "--gradient_checkpointing")
    for i, lm in enumerate(run["lms"]):
        config = json.loads((run["args"].out_dir / f"agent_{i}" / "adapter_config.json").read_text())
        assert lm.folder == folders[i] == config["base_model_name_or_path"] and run["critics"][i].lm[0] is lm
        for turn in run["episodes"][0].turns:  # each with its own tokens
            assert lm.tokenizer.decode(turn.tokens[i], skip_special_tokens=True) == turn.responses[i]
    line = train_lines(run["args"].out_dir)[0]
    prompts = [run["lms"][i].render(history(run["task"], Episode(e.item, e.turns[:t]), i)) for e in run["episodes"]
               for t in range(2) for i in range(2)]
    cut = sum(len(prompt) > 512 - 24 for prompt in prompts)
    assert line["policy/grad_norm"] > 0 and line["inputs/truncated"] == 16 + cut  # 16: all that the critics read


# --- several ranks ----------------------------------------------------------------------------------------------------

def start_ranks(place, script, *arguments):
    port = socket.create_server(("localhost", 0)).getsockname()[1]
    return [place.start(script, *SMALL, *arguments, environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test"}) for rank in (0, 1)]


def join(ranks, code):
    for run in ranks:
        run.process.join(120)
        assert run.process.exitcode == code, run.err.read_text()[-2000:]


@pytest.mark.parametrize("script", ["train_cc.py", "train_mc.py"])
def test_two_ranks_are_one_rank_with_twice_the_episodes(script, inside, place):
    arguments = ["--steps", 1, "--minibatches", 2, "--model", "out/tiny-strbuild"]
    ranks = start_ranks(place, script, *arguments, "--out_dir", "two-" + script)
    one, two = inside(script, *arguments, "--batch_size", 8)["args"].out_dir, place.folder / ("two-" + script)
    join(ranks, 0)
    assert "\n    1 " in ranks[0].out.read_text() and ranks[1].out.read_text() == ""
    assert len(log_of(two)) == 3  # one rank writes
    for left, right in zip(log_of(one), log_of(two), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    before, after = weights_of(one), weights_of(two)
    left, right = (torch.cat([weights[key].flatten() for key in before]) for weights in (before, after))
    assert (left - right).norm() < 0.01 * left.norm()  # where a gradient is 0, Adam turns rounding errors into steps


def test_two_ranks_stop_together(place):
    """A signal may reach only one of them, and neither may wait for the other."""
    ranks, folder = start_ranks(place, "train_cc.py", "--steps", 99, "--out_dir", "stopped"), place.folder / "stopped"
    started = time.time()
    while not ((folder / "log.jsonl").exists() and "train/reward" in (folder / "log.jsonl").read_text()):
        assert ranks[0].process.is_alive() and time.time() - started < 60, ranks[0].err.read_text()
        time.sleep(0.02)
    os.kill(ranks[1].process.pid, signal.SIGTERM)
    join(ranks, 130)
    assert state_of(folder)["progress"]["step"] == train_lines(folder)[-1]["step"] < 99


# --- interrupted, killed, resumed -------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_run_however_often_it_is_evaluated(inside, whole):
    again, one = inside("train_cc.py", "--steps", 4, "--eval_every", 3)["args"].out_dir, whole("train_cc.py")
    assert [line["step"] for line in log_of(again) if "eval/score" in line] == [0, 3, 4]
    assert train_lines(again) == train_lines(one) and log_of(again)[-1] == log_of(one)[-1]
    ours, theirs = weights_of(again), weights_of(one)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    other = inside("train_cc.py", "--steps", 1, "--seed", 1)["args"].out_dir
    assert train_lines(other)[0]["loss/value"] != train_lines(one)[0]["loss/value"]


@pytest.mark.parametrize("script, number", list(zip(SCRIPTS, [signal.SIGTERM, signal.SIGINT, signal.SIGTERM])))
def test_interrupted_runs_save_and_resume_as_if_nothing_had_happened(
        script, number, inside, whole, tmp_path, monkeypatch, capfd):
    log, folder = Run.log, tmp_path / "run"

    def interrupt(run, line, *episodes):
        log(run, line, *episodes)
        if line["step"] == 2 and "train/reward" in line:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupt)
        inside(script, "--steps", 4, "--out_dir", folder, code=130)
    out, err = capfd.readouterr()
    assert f"interrupted: saved {folder} at step 2; continue with --resume" in out and "Traceback" not in err
    assert err.count("interrupted: what is under way will be finished and saved; once more stops at once\n") == 1
    assert state_of(folder)["progress"]["step"] == 2
    inside(script, "--steps", 4, "--out_dir", folder, "--resume")
    assert_same_run(folder, whole(script))


def test_an_interrupted_evaluation_ends_between_its_batches(inside, tmp_path, monkeypatch):
    arguments, judge_all, calls, init = ["--steps", 1], StrBuild.judge_all, [], LanguageModel.__init__
    monkeypatch.setattr(LanguageModel, "__init__", lambda lm, *args: (init(lm, *args), setattr(lm, "is_small", False))[0])
    whole = inside("train_cc.py", *arguments)["args"].out_dir
    with monkeypatch.context() as patch:
        patch.setattr(StrBuild, "judge_all", lambda self, items, *rest: (
            calls.append(len(items)) or os.kill(os.getpid(), signal.SIGTERM), judge_all(self, items, *rest))[1])
        patch.setattr(signal, "SIG_DFL", signal.SIG_IGN)  # there is a second signal, at the second turn
        inside("train_cc.py", *arguments, "--out_dir", tmp_path / "run", code=130)
    assert calls == [4, 4]  # two turns of the first four of six items
    assert not log_of(tmp_path / "run") and state_of(tmp_path / "run")["progress"]["step"] == 0
    inside("train_cc.py", *arguments, "--out_dir", tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "run", whole)


def test_a_run_killed_in_its_first_save_resumes(inside, whole, tmp_path, monkeypatch):
    """The state is written, the adapters are not; what a kill leaves behind is cleared away."""
    save, folder = Run.save, tmp_path / "run"

    def die(run, state):
        save(run, state)
        sys.exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", die)
        inside("train_cc.py", "--steps", 4, "--save_every", 2, "--out_dir", folder, code=9)
    assert "agent_0" not in os.listdir(folder)
    with open(folder / "log.jsonl", "a") as file:  # lines after the last save, the last one half written
        file.write('{"step": 3}\n{"step": 4, "train/rew')
    (folder / "train_state.pt.part").write_bytes(b"half")
    (folder / "agent_0" / ".saving-left").mkdir(parents=True)
    inside("train_cc.py", "--steps", 4, "--save_every", 2, "--out_dir", folder, "--resume")
    assert_same_run(folder, whole("train_cc.py"))
    assert not (folder / "agent_0" / ".saving-left").exists()
    shutil.rmtree(folder / "agent_1")  # killed in its last save: no step is left, and yet the agents must be written
    inside("train_cc.py", "--steps", 4, "--save_every", 2, "--out_dir", folder, "--resume")
    assert_same_run(folder, whole("train_cc.py"))


def test_a_state_that_cannot_be_used_is_refused_and_runs_no_code(inside, copy_of, tmp_path, capfd):
    folder = copy_of()
    good, state = (folder / "train_state.pt").read_bytes(), state_of(folder)
    trap = type("Trap", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "sprung"),))})()
    for spoiled, message in [
            (good[:5000], "train_state.pt cannot be used"), (b"", "train_state.pt cannot be used"),
            (trap, "train_state.pt cannot be used"), ([1], "train_state.pt cannot be used"),
            *(({key: value for key, value in state.items() if key != gone}, f"it has no '{gone}'") for gone in (
                "rng", "critic", "actor_optimizer", "adapters", "texts")),
            (state | {"adapters": {}}, "the saved state does not hold the adapters")]:
        if isinstance(spoiled, bytes):
            (folder / "train_state.pt").write_bytes(spoiled)
        else:
            torch.save(spoiled, folder / "train_state.pt")
        for flag in ("--resume", "--eval_only"):
            kept = bytes_of(folder)
            inside("train_cc.py", "--steps", 4, "--out_dir", folder, flag, code=2)
            err = capfd.readouterr().err
            assert message in err and err.count("\n") == 1, err
            assert bytes_of(folder) == kept or flag == "--resume"
    assert not (tmp_path / "sprung").exists()


# --- the folder of a run ----------------------------------------------------------------------------------------------

def test_eval_only_writes_nothing_and_sees_the_trained_team(inside, whole, place, capfd):
    folder = whole("train_cc.py")
    before, last = bytes_of(folder), log_of(folder)[-1]
    inside("train_cc.py", "--out_dir", folder.name, "--eval_only")
    out = capfd.readouterr().out
    shown = [f"{last['eval/score']:.1f}", f"{last['eval/return']:.2f}", f"{last['eval/response_tokens']:.0f}"]
    assert shown in [row.split()[2:5] for row in out.splitlines() if row.endswith("held-out")]
    said = (folder / "samples.txt").read_text().split("=== step 4, ")[1]
    assert said[said.index("turn 1 |"):].strip() in out  # the agents' last words
    inside("train_cc.py", "--out_dir", folder.name, "--eval_only", "--num_turns", 1)
    assert "turn 0 | agent 0 is told" in capfd.readouterr().out
    inside("train_cc.py", "--out_dir", "nothing", "--eval_only")
    assert "There is no run in nothing: this evaluates the untrained team." in capfd.readouterr().out
    assert bytes_of(folder) == before and not (place.folder / "nothing").exists()


def test_overwriting_takes_only_what_a_run_wrote(inside, copy_of, whole):
    folder = copy_of()
    (folder / "agent_notes.txt").write_text("mine")
    (folder / "train_state.pt.part").write_text("half")
    shutil.copytree(folder / "agent_0", folder / "other")
    inside("train_cc.py", "--steps", 0, "--overwrite", "--seed", 1, "--out_dir", folder)
    assert {*os.listdir(folder)} == {*os.listdir(whole("train_cc.py")), "agent_notes.txt", "other"}
    assert len(log_of(folder)) == 1
    assert not any(x.any() for key, x in weights_of(folder).items() if "lora_B" in key and "agent_" in key)


def test_what_may_differ_between_a_run_and_its_continuation(tmp_path):
    keys = ["algorithm", "task", "world", "num_agents", "lora_rank", "seed", "lr", "lam", "items", "steps", "micro_batch", "model"]
    same = dict.fromkeys(keys, 1) | dict(batch_size=2, group_size=1, ranks=1, out_dir=str(tmp_path), overwrite=False)
    (tmp_path / "config.json").write_text(json.dumps(same))
    refused = {"resume": [], "eval_only": []}
    for flag in refused:
        for key in keys:
            try:
                Run(Namespace(**same | {"resume": False, "eval_only": False, flag: True, key: 2}), 0, ())
            except InputError as error:
                change = "the items differ" if key == "items" else f"{key} 1 -> 2"
                assert f"was made with other settings: {change}." in str(error)
                refused[flag].append(key)
    assert refused["eval_only"] == keys[:5] and refused["resume"] == keys[:9]
    first = Run(Namespace(**same | dict(resume=True, eval_only=False)), 0, ())
    with pytest.raises(InputError, match="another process is training in"):
        Run(Namespace(**same | dict(resume=True, eval_only=False)), 0, ())
    first.lock.close()


@pytest.mark.parametrize("script, flag", [("train_cc.py", "--lr"), ("train_dc.py", "--critic_lr"), ("train_mc.py", "--lr")])
def test_a_gradient_that_is_not_a_number_ends_the_run_and_spoils_nothing(script, flag, inside, tmp_path, capfd):
    inside(script, flag, 1e9, "--steps", 3, "--save_every", 1, "--passes", 1, "--minibatches", 1, "--out_dir", tmp_path, code=2)
    assert "error: a gradient is NaN or infinite; lower learning rates may help.\n" in capfd.readouterr().err
    state = state_of(tmp_path)
    assert state["progress"]["step"] == 1 and all(weights.isfinite().all() for weights in state["adapters"].values())


@pytest.mark.parametrize("case", [
    *(f"{script} --batch_size 1 --group_size 1 --gamma 1 | advantages compare episodes" for script in SCRIPTS),
    "train_mc.py --group_size 1 | advantages compare episodes",
    "train_mc.py --group_size 1 --baseline loo | advantages compare episodes",
    "train_mc.py --group_size 3 | group_size 3 does not divide batch_size 4",
    "train_cc.py --task chess | There is no task 'chess'",
    "train_cc.py --data broken.jsonl | broken.jsonl, line 2",
    "train_cc.py --lam 1.5 | at least 0 and at most 1",
    "train_cc.py --device cuda:9 | must be cpu or an available cuda device, not cuda:9",
    "train_cc.py --resume | no run in unborn",
    "train_cc.py --resume --overwrite | not allowed with argument --resume",
    "train_cc.py --out_dir full --overwrite | full is not empty",
    "train_cc.py --out_dir whole-train_cc.py | holds another run; use --resume, --overwrite",
    "train_dc.py --out_dir whole-train_cc.py --resume | algorithm 'cc' -> 'dc'",
    "train_cc.py --out_dir whole-train_cc.py --resume --lr 0.5 | -> 0.5."])
def test_a_users_error_is_one_sentence_and_nothing_is_made(case, inside, place, whole, monkeypatch, capfd):
    (script, *arguments), message = case.split(" | ")[0].split(), case.split(" | ")[1]
    (place.folder / "full").mkdir(exist_ok=True)
    (place.folder / "full" / "thesis.txt").write_text("mine")
    (place.folder / "broken.jsonl").write_text('{"string": "CAT"}\n{"string": "DOG"\n')
    kept = bytes_of(whole("train_cc.py"))
    inside(script, "--out_dir", "unborn", *arguments, code=2)
    err = capfd.readouterr().err.splitlines()
    assert message in err[-1] and "error: " in err[-1] and [line[:7] for line in err[:-1]] in ([], ["usage: "]), err
    assert not (place.folder / "unborn").exists() and os.listdir(place.folder / "full") == ["thesis.txt"]
    assert bytes_of(whole("train_cc.py")) == kept


# --- the trained team at work -----------------------------------------------------------------------------------------

def test_play_is_each_agent_with_its_own_adapter_history_and_generator(place, copy_of, monkeypatch, capfd):
    """One process per agent, in a folder without a critic; then agent 1 in a folder without agent 0."""
    folder, episode = copy_of(), Episode({"string": "LI"})
    config = json.loads((folder / "config.json").read_text()) | {"temperature": 0.7, "top_p": 0.9}
    (folder / "config.json").write_text(json.dumps(config))
    lms = [LanguageModel(place.tiny, rank=4) for _ in range(2)]
    for i, lm in enumerate(lms):
        torch.manual_seed(i)
        for p in lm.add_adapter(f"agent_{i}"):
            torch.nn.init.normal_(p, std=0.1)
        lm.save_adapter(f"agent_{i}", str(folder))
    for name in {*os.listdir(folder)} - {"config.json", "agent_0", "agent_1"}:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else os.remove(folder / name)
    task, generators = get_task("strbuild", num_turns=2), [torch.Generator().manual_seed(5000 + i) for i in range(2)]
    heard = [[], []]
    for t in range(2):
        responses = []
        for i, lm in enumerate(lms):
            messages = history(task, episode, i)
            uniforms = torch.rand(1, 24, generator=generators[i])
            responses += lm.generate(f"agent_{i}", [lm.render(messages)], uniforms, 0.7, 0.9)[2]
            heard[i].append(json.dumps(messages) + "\n")
        episode.turns.append(Turn(None, None, None, responses, task.judge(episode.item, responses, t)))

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["model.py", str(folder), "--device", "cpu", "--seed", "5", *arguments])
        model.main()
        return capfd.readouterr().out

    monkeypatch.chdir(place.folder)
    out = main("--string", "li")
    assert dialogue(task, episode, False) in out and "'LI'}: score" in out.splitlines()[-1]
    shutil.rmtree(folder / "agent_0")
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(heard[1])))
    assert [json.loads(line) for line in main("--agent", "1").splitlines()] == [turn.responses[1] for turn in episode.turns]


def test_playing_what_cannot_be_played(place, whole, copy_of, monkeypatch, capfd):
    monkeypatch.chdir(place.folder)
    folder = copy_of()
    shutil.rmtree(folder / "agent_1")
    for arguments, message in [(["nowhere"], "nowhere is not a run folder"), ([place.tiny], "is not a run folder"),
                               ([whole("train_cc.py"), "--string", "D?G"], "not 'D?G'"), ([folder, "--string", "{D"], "no item of strbuild: Expecting"), ([folder, "--device", "cuda:99"], "cuda:99"),
                               ([folder, "--agent", 1], f"{folder}/agent_1 is no adapter of out/tiny-strbuild")]:
        monkeypatch.setattr(sys, "argv", ["model.py", "--device", "cpu", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            model.main()
        err = capfd.readouterr().err
        assert end.value.code == 2 and message in err and err.count("\n") == 1, err
