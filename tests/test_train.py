"""Training runs of a few seconds: seeds, interruptions, kills, micro-batches and invalid input."""
import difflib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from critic import baselines, td_targets
from model import LanguageModel, model_folders
from tasks import (Episode, Turn, check_ranges, check_run_folder, dialogue, exit_on_error, get_task, history, log_text,
                   open_run_folder, truncate_logs)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train_cc.py", "train_dc.py", "train_mc.py"]
SMALL = ["--device", "cpu", "--batch_size", 4, "--num_turns", 2, "--max_new_tokens", 24, "--lora_rank", 4, "--seed", 2]
FILES = {"config.json", "log.jsonl", "samples.txt", "train_state.pt", "agent_0", "agent_1", "critic"}


@pytest.fixture(scope="session")
def data(workplace):
    path = workplace.folder / "words.jsonl"
    lines = [{"string": word} for word in ["I", "L", "T", "MC", "1"]] + [{"string": "IC", "split": "eval"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def train(workplace, data):
    """train("name", "--steps", 2, ...) is a run in out_dir "name" that has to succeed; returns its folder."""
    def train(name, *arguments, code=0, script="train_cc.py"):
        run = workplace.run(script, *SMALL, "--data", data, "--out_dir", name, *arguments)
        assert run.code == code, run.err[-2000:]
        return workplace.folder / name
    return train


@pytest.fixture(scope="session")
def four_steps(workplace, data):
    """The run that others are compared with; no test writes into it."""
    run = workplace.run("train_cc.py", *SMALL, "--data", data, "--out_dir", "four", "--steps", 4)
    assert run.code == 0, run.err[-2000:]
    return workplace.folder / "four"


def log_of(folder):
    """The lines of log.jsonl without times and memory."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines(True) if line.endswith("\n")]
    clock = ("wall_s", "time/", "memory")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]


def train_lines(folder):
    return [line for line in log_of(folder) if "train/reward" in line]


def weights_of(folder):
    return {f"{file.parent.name}/{key}": value for file in sorted(folder.glob("*/adapter_model.safetensors"))
            for key, value in load_file(file).items()}


def same_weights(one, two):
    one, two = weights_of(one), weights_of(two)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --- what a run leaves behind -----------------------------------------------------------------------------------------

def test_a_run_writes_what_it_promises(four_steps, workplace):
    assert FILES == set(os.listdir(four_steps))
    config = json.loads((four_steps / "config.json").read_text())
    assert config["batch_size"] == 4 and config["seed"] == 2 and config["versions"]["torch"].startswith("2.")
    lines = log_of(four_steps)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4] and [line["step"] for line in train_lines(four_steps)] == [1, 2, 3, 4]
    assert "eval/score" in lines[0] and "eval/score" in lines[-1] and lines[0]["joint_actions"] == 0
    assert lines[-1]["episodes"] == 16 and 16 < lines[-1]["joint_actions"] <= 32
    assert len({line["train/reward"] for line in train_lines(four_steps)}) > 1, "the base is too bad for these tests"
    assert all(line["policy/grad_norm"] > 0 and line["loss/value"] > 0 for line in train_lines(four_steps))
    for line in train_lines(four_steps):
        assert {"episodes", "tokens", "train/return", "train/score", "train/turns", "train/response_tokens",
                "train/truncated", "loss/policy", "value/explained_variance", "policy/entropy"} <= line.keys()
    assert "oak_planks" in (four_steps / "samples.txt").read_text()
    # the agents have moved, each in its own direction, and the base has not
    weights = weights_of(four_steps)
    moved = [{key: value for key, value in weights.items() if key.startswith(name) and "lora_B" in key}
             for name in ("agent_0", "agent_1", "critic")]
    assert all(any(value.abs().max() > 0 for value in group.values()) for group in moved)
    assert not all(torch.equal(value, weights[key.replace("agent_0", "agent_1")]) for key, value in moved[0].items())


def test_peft_reads_the_trained_agents(four_steps, workplace):
    lm = LanguageModel(workplace.tiny)
    lm.add_adapter("agent_1", str(four_steps / "agent_1"))
    prompt, answer = lm.render([{"role": "user", "content": "Build I with white_concrete obsidian."}]), [5, 6, 300, lm.end]
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workplace.tiny), four_steps / "agent_1")
    with torch.no_grad():
        logp = peft(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    ours, _ = lm.logprobs(["agent_1"], [prompt], [answer])
    assert torch.allclose(ours, torch.stack([logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]), atol=1e-5)


# --- the same again ---------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_run_and_another_seed_another(train, four_steps):
    again = train("again", "--steps", 4)
    assert log_of(again) == log_of(four_steps) and same_weights(again, four_steps)
    other = train("other", "--steps", 2, "--seed", 1)
    assert train_lines(other)[0]["loss/value"] != train_lines(four_steps)[0]["loss/value"]


def test_how_often_a_team_is_evaluated_changes_nothing_else(train, four_steps):
    often = train("often", "--steps", 4, "--eval_every", 1)
    assert train_lines(often) == train_lines(four_steps) and same_weights(often, four_steps)


def test_a_finished_run_can_be_made_longer(train, four_steps):
    """The learning rate falls to 0 at the last step, so two steps and two more are not the four of a single run."""
    folder = train("longer", "--steps", 2)
    two = train_lines(folder)
    train("longer", "--steps", 4, "--resume")
    lines = train_lines(folder)
    assert lines[:2] == two and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["episodes"] == 16 and lines[-1] != train_lines(four_steps)[-1]


def test_a_counter_goes_on_after_a_resume(train):
    whole = train("cut", "--steps", 2, "--critic_tokens", 8)
    train("cut-twice", "--steps", 1, "--critic_tokens", 8)
    assert train_lines(train("cut-twice", "--steps", 2, "--critic_tokens", 8, "--resume"))[-1] == train_lines(whole)[-1]


def test_micro_batches_change_memory_but_not_the_gradient(train):
    """One optimizer step: Adam's first moment is the (clipped) gradient itself."""
    gradients, norms = [], []
    for size in (1, 2, 8):
        folder = train(f"micro-{size}", "--steps", 1, "--passes", 1, "--minibatches", 1, "--micro_batch", size)
        state = torch.load(folder / "train_state.pt", weights_only=False)
        gradients.append([torch.cat([moment["exp_avg"].flatten() for moment in state[name]["state"].values()])
                          for name in ("actor_optimizer", "critic_optimizer")])
        norms.append(train_lines(folder)[0]["policy/grad_norm"])
    for one in gradients[1:]:
        for ours, theirs in zip(one, gradients[0]):
            assert ours.norm() > 0 and (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_logged_numbers_do_not_depend_on_micro_batches(train):
    """Means over the step's answers or tokens, not means of the means of unequal micro-batches."""
    lines = [train_lines(train(f"logged-{size}", "--steps", 1, "--passes", 1, "--minibatches", 1, "--micro_batch", size))[0]
             for size in (3, 64)]
    by_turn = [line.pop("value/explained_variance_by_turn") for line in lines]
    assert lines[0] == pytest.approx(lines[1], rel=1e-3) and by_turn[0] == pytest.approx(by_turn[1], rel=1e-3)


# --- three scripts, one skeleton --------------------------------------------------------------------------------------

def changed_lines(one, two):
    """(lines of one, lines of two) that differ."""
    diff = list(difflib.unified_diff((ROOT / one).read_text().splitlines(), (ROOT / two).read_text().splitlines(), n=0))
    return [[line[1:] for line in diff[2:] if line.startswith(sign)] for sign in "-+"]


def test_the_diff_of_cc_and_dc_is_the_algorithm():
    cc, dc = changed_lines("train_cc.py", "train_dc.py")
    print(f"\ndiff train_cc.py train_dc.py: {len(cc) + len(dc)} changed lines")
    assert len(cc) + len(dc) < 25
    header = (ROOT / "train_dc.py").read_text().split('"""')[1].splitlines()
    code = [line for line in dc if line not in header]
    assert [re.match(r"\w+", line)[0] for line in code] == ["ALGORITHM", "critics", "reads", "critic_of"]


def test_the_three_scripts_have_the_same_sections_in_the_same_order():
    rulers = [re.findall(r"^# --- (.+?) -+$", (ROOT / script).read_text(), re.M) for script in SCRIPTS]
    assert rulers[0] == rulers[1] and len(rulers[0]) == 10
    assert rulers[2] == [ruler for ruler in rulers[0] if ruler != "critics"]


def test_one_agent_is_the_same_in_cc_and_dc(train):
    """With one agent the joint history is that agent's: ordinary single-agent actor-critic, to the last bit."""
    one, two = (train(f"alone-{script}", "--steps", 3, "--num_agents", 1, script=script) for script in SCRIPTS[:2])
    assert log_of(one) == log_of(two)
    one, two = weights_of(one), weights_of(two)
    assert [torch.equal(one[key], two[key.replace("critic/", "critic_0/")]) for key in one] == [True] * len(two)


def test_all_scripts_write_the_same_log_keys_and_stay_apart(train, four_steps):
    names = {"train_dc.py": {"agent_0", "agent_1", "critic_0", "critic_1"}, "train_mc.py": {"agent_0", "agent_1"}}
    for script, folders in names.items():
        folder = train(f"keys-{script}", "--steps", 2, script=script)
        assert {name for name in os.listdir(folder) if (folder / name).is_dir()} == folders
        for line in (0, 1, -1):  # an evaluation, a training step, an evaluation
            assert log_of(folder)[line].keys() == log_of(four_steps)[line].keys()
        assert log_of(folder)[0] == log_of(four_steps)[0]  # the same untrained team
        assert all(value == value for line in train_lines(folder) for value in line.values())


@pytest.fixture
def inside(inside, data):
    """The small run of this file, in this process; see conftest.py."""
    return lambda script, *arguments: inside(script, *SMALL, "--data", data, *arguments)


def advantages_of(episodes):
    return [[list(turn.advantages) for turn in e.turns] for e in episodes]


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_advantages_are_td_errors_of_the_right_critic(inside, script):
    run = inside(script, "--steps", 1, "--lam", 0.5)
    episodes, agents = run["episodes"], range(2)
    errors = [[td_targets(e.rewards, [turn.values[c] for turn in e.turns], 0.9, 0.5)[1]
               for c in ([0, 0] if script == "train_cc.py" else [0, 1])] for e in episodes]  # [episode][agent][turn]
    everything = torch.tensor([[errors[k][i][t] for i in agents] for k, e in enumerate(episodes)
                               for t in range(len(e.turns))])
    expected = (everything - everything.mean()) / everything.std(correction=0)
    ours = torch.tensor([row for e in advantages_of(episodes) for row in e])
    assert torch.allclose(ours, expected, atol=1e-4)
    for turn in [turn for e in episodes for turn in e.turns]:
        texts = [run["lms"][0].tokenizer.decode(ids) for ids in turn.critic_inputs]
        shown = [[0, 1]] if script == "train_cc.py" else [[0], [1]]  # the agents whose histories each critic reads
        assert [[i for i in agents if f"with {' '.join(run['task'].palettes[i])}" in text] for text in texts] == shown


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_values_are_those_before_the_critic_learned_from_an_episode(inside, micro_batch):
    run = inside("train_cc.py", "--steps", 1, "--passes", 3, "--minibatches", 1, "--micro_batch", micro_batch)
    critic, turns = run["critics"][0], [(t, turn) for e in run["episodes"] for t, turn in enumerate(e.turns)]
    mean = critic.mean.tolist()  # what an untrained critic says
    assert all(turn.values == {0: pytest.approx(mean[t], abs=1e-5)} for t, turn in turns)
    with torch.no_grad():
        now = critic([turn.critic_inputs[0] for _, turn in turns], [t for t, _ in turns])
    assert (now - torch.tensor([mean[t] for t, _ in turns])).abs().max() > 1e-3  # it has learned since
    assert run["stats"]["value/explained_variance_by_turn"] == pytest.approx([0, 0], abs=1e-4)


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_the_value_loss_of_an_untrained_critic_by_hand(inside, script):
    run = inside(script, "--steps", 1, "--passes", 1, "--minibatches", 1, "--micro_batch", 3, "--lam", 0.5)
    losses = []
    for critic in run["critics"]:
        mean, std = critic.mean.tolist(), critic.std.tolist()  # what it says before it has learned; its unit
        for e in run["episodes"]:
            targets, _ = td_targets(e.rewards, mean[:len(e.turns)], 0.9, 0.5)
            losses += [((mean[t] - target) / std[t]) ** 2 for t, target in enumerate(targets)]
    assert run["stats"]["loss/value"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


@pytest.mark.parametrize("baseline", ["group", "loo", "none"])
def test_monte_carlo_advantages_by_hand(inside, baseline):
    episodes = inside("train_mc.py", "--steps", 1, "--baseline", baseline, "--group_size", 2)["episodes"]
    assert [e.item for e in episodes[::2]] == [e.item for e in episodes[1::2]]
    returns = [td_targets(e.rewards, [0, 0], 0.9, 1.0)[0] for e in episodes]
    errors = []
    for k, ret in enumerate(returns):
        pair = [returns[k // 2 * 2], returns[k // 2 * 2 + 1]]
        errors += [ret[t] - baselines([one[t] for one in pair], baseline)[k % 2] for t in range(2)]
    expected = torch.tensor(errors) / torch.tensor(errors).square().mean().sqrt()
    ours = torch.tensor([row for e in advantages_of(episodes) for row in e])
    assert torch.allclose(ours, expected[:, None].expand(-1, 2), atol=1e-4)
    assert (baseline == "none") == bool((expected < 0).all())  # rewards are negative: nothing to compare with


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_actors_gradient_and_clipped_loss_by_hand(inside, script):
    """A first minibatch has the gradient of - mean A log pi; then agents are moved so far that clipping matters."""
    run = inside(script, "--steps", 1, "--passes", 1, "--minibatches", 1, "--micro_batch", 3, "--temperature", 0.7,
                 *(["--group_size", 2] if script == "train_mc.py" else []))
    lm, turns, ours = run["lms"][0], [turn for e in run["episodes"] for turn in e.turns], run["actor_parameters"]

    def answers():
        """Of every answer: each token's log pi now and when it was sampled, and its agent's advantage."""
        for i in range(2):
            for turn in turns:
                logp, _ = lm.logprobs([f"agent_{i}"], [turn.prompts[i]], [turn.tokens[i]], 0.7)
                yield logp, torch.tensor(turn.logps[i]), turn.advantages[i]

    with torch.no_grad():
        for key, p in lm.causal_lm.named_parameters():
            if "lora_B" in key:
                p.zero_()  # as before the step, which moved nothing else
    assert all(torch.allclose(logp, sampled, atol=1e-4) for logp, sampled, _ in answers())
    loss = -sum(advantage * logp.sum() for logp, _, advantage in answers()) / (2 * len(turns))
    gradient = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, ours)])
    state = run["actor_optimizer"].state
    moment = torch.cat([state[p]["exp_avg"].flatten() for p in ours]) / 0.1  # Adam's first: the gradient, clipped to norm 1
    assert run["stats"]["policy/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
    assert torch.allclose(moment, gradient / max(1, gradient.norm()), atol=1e-4)
    torch.manual_seed(0)
    for p in ours:
        p.data += 0.1 * torch.randn_like(p)
    for turn in turns:
        turn.advantages = [turn.advantages[0], -turn.advantages[1] / 2]  # to each agent its own
    expected, kinds = 0.0, set()
    with torch.no_grad():
        for logp, sampled, advantage in answers():
            for ratio in (logp - sampled).exp().tolist():  # clipped only in the direction that the advantage rewards
                used = min(ratio, 1.2) if advantage > 0 else max(ratio, 0.8)
                expected -= used * advantage / (2 * len(turns))
                kinds.add((advantage > 0, ratio > 1.2, ratio < 0.8))
    assert len(kinds) == 6, "this test wants ratios on both sides of both bounds"
    assert run["update_actors"](run["played" if script == "train_mc.py" else "episodes"])["loss/policy"] == pytest.approx(
        expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rank_without_running_episodes_draws_as_many_numbers_as_the_others(inside, script):
    run = inside(script, "--steps", 0)
    run["args"].ranks, ours, all_turns = 2, torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    assert run["rollout"]([{"string": "I"}], ours) == []  # rank 0 has no share of one item
    for _ in range(2):
        torch.rand(1, 2, 24, generator=all_turns)
    assert torch.equal(ours.get_state(), all_turns.get_state())


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_episode_that_is_good_enough_goes_no_further(inside, script):
    run = inside(script, "--steps", 0)
    judge_all = run["task"].judge_all

    def generous(items, *rest):
        outcomes = judge_all(items, *rest)
        for item, outcome in zip(items, outcomes):
            outcome.done = item["string"] == "I"
        return outcomes

    run["task"].judge_all = generous
    episodes = run["rollout"]([{"string": "I"}, {"string": "L"}], torch.Generator().manual_seed(0))
    assert [len(e.turns) for e in episodes] == [1, 2]


def test_a_critic_keeps_the_scale_of_the_first_step_and_its_own_rate(inside, data):
    run = inside("train_cc.py", "--steps", 2, "--save_every", 1, "--lr", 1e-4, "--critic_lr", 3e-3)
    critic, returns = run["critics"][0], torch.tensor([e.returns(0.9) for e in run["episodes"] if len(e.turns) == 2])
    assert not torch.allclose(critic.mean, returns.mean(0), atol=1e-3)  # the episodes are those of the second step
    assert run["critic_optimizer"].param_groups[0]["lr"] == 3e-3 and run["actor_optimizer"].param_groups[0]["lr"] == 5e-5
    saved = torch.load(run["args"].out_dir / "critic" / "value_head.pt", weights_only=True)
    assert saved.keys() == critic.state_dict().keys() and all(torch.equal(saved[key], x) for key, x in critic.state_dict().items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_held_out_items_are_not_trained_on(inside, script, tmp_path):
    lines = [{"string": "I"}] + [{"string": word, "split": "eval"} for word in ("L", "T", "C", "1")]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    episodes = inside(script, "--steps", 1, "--data", tmp_path / "words.jsonl", "--top_p", 0.001)["episodes"]
    assert [e.item["string"] for e in episodes] == ["I"] * 4
    assert len({tuple(e.turns[0].responses) for e in episodes}) == 1  # a nucleus of one token leaves no choice


@pytest.mark.parametrize("baseline", ["group", "loo"])
def test_a_tree_by_hand(inside, baseline):
    """Two items, two joint actions at each turn: 8 episodes that consist of 12 joint actions."""
    run = inside("train_mc.py", "--steps", 1, "--tree", "--baseline", baseline, "--group_size", 2, "--batch_size", 8,
                 "--passes", 1, "--minibatches", 3)
    episodes, played = run["episodes"], run["played"]
    assert all(len(e.turns) == 2 for e in episodes), "this test wants episodes that do not end early"
    assert run["progress"]["episodes"] == 8 and run["progress"]["joint_actions"] == 12
    errors = {}
    for first in (0, 4):
        tree = episodes[first:first + 4]
        assert len({json.dumps(e.item) for e in tree}) == 1 and len({id(e.turns[1]) for e in tree}) == 4
        assert tree[0].turns[0] is tree[1].turns[0] and tree[2].turns[0] is tree[3].turns[0] is not tree[0].turns[0]
        later = [e.rewards[1] for e in tree]
        first_turn = [tree[0].rewards[0] + 0.9 * (later[0] + later[1]) / 2, tree[2].rewards[0] + 0.9 * (later[2] + later[3]) / 2]
        for turns, returns in [([e.turns[0] for e in tree[::2]], first_turn), ([e.turns[1] for e in tree[:2]], later[:2]),
                               ([e.turns[1] for e in tree[2:]], later[2:])]:
            for turn, ret, other in zip(turns, returns, reversed(returns)):
                errors[id(turn)] = ret - other if baseline == "loo" else (ret - other) / 2
    spread = torch.tensor(list(errors.values())).square().mean().sqrt().item()
    assert len(errors) == len(played) == 12 and spread > 0
    for one, two in zip(played[::2], played[1::2]):  # two answers to one history
        assert one.turns[0].prompts == two.turns[0].prompts
    for e in played:
        assert e.turns[0].advantages == pytest.approx([errors[id(e.turns[0])] / spread] * 2, abs=1e-4)
    logp, _ = run["lms"][0].logprobs(["agent_0"] * 12, [e.turns[0].prompts[0] for e in played],
                                     [e.turns[0].tokens[0] for e in played])
    sampled = torch.tensor([x for e in played for x in e.turns[0].logps[0]])
    assert (logp - sampled).abs().mean() < 0.05  # the agent has hardly moved: these are the histories that it answered


def test_a_tree_of_one_turn_is_a_group(train):
    tree, group = (train(name, "--steps", 2, "--num_turns", 1, *more, script="train_mc.py")
                   for name, more in [("tree", ["--tree"]), ("no-tree", [])])
    assert same_weights(tree, group)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_group_plays_one_item_and_is_learned_from_together(inside, script):
    run = inside(script, "--steps", 1, "--group_size", 2, "--minibatches", 2)
    episodes = run["episodes"]
    assert [e.item for e in episodes[::2]] == [e.item for e in episodes[1::2]]
    rng = random.Random(2)  # what was drawn: an item per group, then in each pass of critics and actors the groups' order
    for _ in range(2):
        rng.choice(run["task"].train_items)
    for _ in range(2 * (len(run.get("critics", [])) + 1)):
        run["minibatches"](episodes, 2, 2, rng)
    assert run["rng"].getstate() == rng.getstate()
    parts = run["minibatches"](episodes, 2, 2, run["rng"])
    assert sorted([id(e) for e in part] for part in parts) == sorted([list(map(id, episodes[:2])), list(map(id, episodes[2:]))])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_persistent_world_with_a_sparse_reward(inside, workplace, script):
    arguments = ["--steps", 1, "--world", "persistent", "--reward", "sparse", "--num_turns", 3, "--model", "out/tiny-strbuild"]
    run = inside(script, *arguments)
    episodes = run["episodes"]
    for e in episodes:
        assert [turn.outcome.reward for turn in e.turns[:-1]] == [0, 0] and e.turns[-1].outcome.reward < 0
        for one, two in zip(e.turns, e.turns[1:]):
            assert one.outcome.world.keys() <= two.outcome.world.keys()
    assert any(e.turns[0].outcome.world for e in episodes), "the base is too bad for this test"
    if script == "train_mc.py":  # one is enough: playing does not know how a team was trained
        play = workplace.run("model.py", run["args"].out_dir)
        assert play.code == 0 and "blocks:" in play.out and play.out.count("reward 0.000") == 2, play.err[-2000:]


# --- interrupted and killed -------------------------------------------------------------------------------------------

def wait_for(run, path, text, timeout=60):
    """Wait until the file at path contains text."""
    started = time.time()
    while not (path.exists() and text in path.read_text()):
        assert run.process.is_alive(), run.err.read_text()
        assert time.time() - started < timeout, f"{text!r} did not come"
        time.sleep(0.01)


def resume_and_compare(train, folder, four_steps, *arguments):
    """Continue a run to its end: bit for bit it equals an undisturbed run."""
    train(folder.name, "--steps", 4, "--resume", *arguments)
    assert train_lines(folder) == train_lines(four_steps) and log_of(folder)[-1] == log_of(four_steps)[-1]
    assert same_weights(folder, four_steps) and set(os.listdir(folder)) == FILES
    ours, theirs = (torch.load(path / "train_state.pt", weights_only=False) for path in (folder, four_steps))
    assert ours["rng"] == theirs["rng"] and torch.equal(ours["generator"], theirs["generator"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_control_c_saves_and_resume_goes_on(workplace, data, train, four_steps, number):
    folder = workplace.folder / f"interrupted-{number.name}"
    run = workplace.start("train_cc.py", *SMALL, "--data", data, "--out_dir", folder.name, "--steps", 4, "--save_every", 99)
    wait_for(run, folder / "log.jsonl", "train/reward")
    os.kill(run.process.pid, number)
    run.process.join(60)
    assert run.process.exitcode == 130 and "Traceback" not in run.err.read_text()
    assert run.err.read_text().count("interrupted: what is under way will be finished and saved; once more stops at once\n") == 1
    assert "--resume" in run.out.read_text().splitlines()[-1]
    step = train_lines(folder)[-1]["step"]
    assert torch.load(folder / "train_state.pt", weights_only=False)["progress"]["step"] == step < 4
    resume_and_compare(train, folder, four_steps, "--save_every", 99)


def test_control_c_before_there_is_anything_to_save(workplace, tmp_path):
    run = workplace.start("train_cc.py", *SMALL, folder=tmp_path)
    wait_for(run, run.err, "building")
    os.kill(run.process.pid, signal.SIGINT)
    run.process.join(60)
    assert run.process.exitcode == 130 and "Traceback" not in run.err.read_text()
    assert "nothing to save yet" in run.out.read_text() and not (tmp_path / "out" / "cc-strbuild").exists()


def test_an_evaluation_that_a_stop_cut_off_is_made_on_resume(workplace, data, train):
    flags = ["--steps", 3, "--eval_every", 1, "--save_every", 1]
    whole = train("evaluated", *flags)
    assert [line["step"] for line in log_of(whole) if "eval/score" in line] == [0, 1, 2, 3]
    folder = workplace.folder / "cut-off"
    run = workplace.start("train_cc.py", *SMALL, "--data", data, "--out_dir", folder.name, *flags)
    wait_for(run, folder / "log.jsonl", "eval/score")
    os.kill(run.process.pid, signal.SIGINT)
    run.process.join(60)
    assert run.process.exitcode == 130 and "train/" in (folder / "log.jsonl").read_text().splitlines()[-1]
    train(folder.name, *flags, "--resume")
    assert log_of(folder) == log_of(whole) and (folder / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    train(folder.name, *flags[2:], "--steps", 2, "--resume")  # fewer than it already has
    assert log_of(folder) == log_of(whole)


def test_overwriting_takes_only_what_a_run_wrote(train, four_steps, workplace):
    folder = workplace.folder / "shelf[1]"  # must not be read as a file-name pattern
    shutil.copytree(four_steps, folder)
    shutil.copytree(four_steps, folder / "another")
    (folder / "agent_notes.txt").write_text("mine")
    (folder / "train_state.pt.part").write_text("half")
    train(folder.name, "--steps", 0, "--overwrite")
    assert (folder / "agent_notes.txt").read_text() == "mine" and not (folder / "train_state.pt.part").exists() and same_weights(folder / "another", four_steps)
    assert len(log_of(folder)) == 1 and not same_weights(folder, four_steps)


@pytest.mark.parametrize("save_every, last_words", [(99, '"step": 1'), (2, '"step": 3'), (1, '"step": 2')],
                         ids=["before the first save", "between saves", "while saving"])
def test_a_killed_run_resumes(workplace, data, train, four_steps, save_every, last_words):
    folder = workplace.folder / f"killed-{save_every}"
    run = workplace.start("train_cc.py", *SMALL, "--data", data, "--out_dir", folder.name, "--steps", 4,
                          "--save_every", save_every)
    wait_for(run, folder / "log.jsonl", last_words)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join(60)
    assert run.process.exitcode == -signal.SIGKILL
    with open(folder / "log.jsonl", "a") as file:  # a line half written at that moment
        file.write('{"step": 3, "train/rew')
    (folder / "train_state.pt.part").write_bytes(b"half")
    (folder / ".saving-left").mkdir()
    resume_and_compare(train, folder, four_steps, "--save_every", save_every)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_the_siblings_resume_as_well(workplace, data, train, script):
    whole, folder = train(f"whole-{script}", "--steps", 4, script=script), workplace.folder / f"killed-{script}"
    run = workplace.start(script, *SMALL, "--data", data, "--out_dir", folder.name, "--steps", 4, "--save_every", 2)
    wait_for(run, folder / "log.jsonl", '"step": 3')
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join(60)
    train(folder.name, "--steps", 4, "--save_every", 2, "--resume", script=script)
    assert log_of(folder) == log_of(whole) and same_weights(folder, whole)
    assert (folder / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    run = workplace.run(script, *SMALL, "--data", data, "--out_dir", folder.name, "--eval_only")
    assert run.code == 0 and f"eval step 4 | return {log_of(whole)[-1]['eval/return']:.4g} | reward " in run.out
    run = workplace.run("model.py", folder.name, "--string", "li")
    assert run.code == 0 and "score" in run.out.splitlines()[-1], run.err[-2000:]


def test_a_finished_run_can_be_resumed_without_harm(train, four_steps, workplace):
    folder = workplace.folder / "finished"
    shutil.copytree(four_steps, folder)
    train("finished", "--steps", 4, "--resume")
    assert same_weights(folder, four_steps) and log_of(folder) == log_of(four_steps)
    assert (folder / "samples.txt").read_text() == (four_steps / "samples.txt").read_text()


def test_a_run_killed_in_its_last_save_gets_its_agents(train, four_steps, workplace):
    """The state is written before the adapters; a run without a step left must still write these."""
    folder = workplace.folder / "last-save"
    shutil.copytree(four_steps, folder)
    shutil.rmtree(folder / "agent_1")
    train("last-save", "--steps", 4, "--resume")
    assert same_weights(folder, four_steps)


def test_a_run_killed_in_its_first_write_can_be_started_again(train, workplace):
    (workplace.folder / "first-write").mkdir()
    (workplace.folder / "first-write" / "config.json.part").write_text('{"mod')
    train("first-write", "--steps", 0)


def test_a_tiny_base_that_was_never_finished_trips_nobody(workplace, tmp_path):
    """What a killed build leaves is neither used nor in the way."""
    (tmp_path / "out" / ".tiny-left" / "model").mkdir(parents=True)
    (tmp_path / "out" / ".tiny-left" / "model" / "config.json").write_text('{"model_')
    run = workplace.start("train_cc.py", *SMALL, folder=tmp_path)
    wait_for(run, run.err, "building")  # a minute or two: it is killed long before
    assert not (tmp_path / "out" / "tiny-strbuild").exists()
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join(60)
    assert not (tmp_path / "out" / "tiny-strbuild").exists() and not (tmp_path / "out" / "cc-strbuild").exists()
    shutil.copytree(workplace.tiny, tmp_path / "out" / "tiny-strbuild")
    assert workplace.run("train_cc.py", *SMALL, "--steps", 0, folder=tmp_path).code == 0


# --- flags ------------------------------------------------------------------------------------------------------------

def test_eval_only_writes_nothing_and_sees_the_trained_team(workplace, data, four_steps):
    before = {path: path.read_bytes() for path in four_steps.rglob("*") if path.is_file()}
    run = workplace.run("train_cc.py", *SMALL, "--data", data, "--out_dir", "four", "--eval_only")
    assert run.code == 0, run.err[-2000:]
    assert {path: path.read_bytes() for path in four_steps.rglob("*") if path.is_file()} == before
    last = log_of(four_steps)[-1]
    assert "eval " + log_text(last, ["step", *(key for key in last if key.startswith("eval/"))]) in run.out
    assert f" | score {last['eval/score']:.4g} | " in run.out and f" | coverage {last['eval/coverage']:.4g} | " in run.out
    assert "other settings" not in run.out and "untrained" not in run.out
    played = (four_steps / "samples.txt").read_text().rsplit("=== step 4, ", 1)[1]
    assert played.split("\n", 1)[1].strip() in run.out  # the trained agents' words
    raw = workplace.run("train_cc.py", *SMALL, "--data", data, "--out_dir", "nothing", "--eval_only")
    first = log_of(four_steps)[0]
    assert f"eval step 0 | return {first['eval/return']:.4g} | reward {first['eval/reward']:.4g}" in raw.out
    assert "There is no run in nothing: this evaluates the untrained team." in raw.out
    assert not (workplace.folder / "nothing").exists()


@pytest.mark.parametrize("script, flag", [("train_dc.py", "--resume"), ("train_mc.py", "--resume"), ("train_dc.py", "--eval_only")])
def test_a_run_of_another_algorithm_is_left_alone(workplace, data, four_steps, script, flag):
    before = {path: path.read_bytes() for path in four_steps.rglob("*") if path.is_file()}
    run = workplace.run(script, *SMALL, "--data", data, "--out_dir", "four", "--steps", 4, flag)
    assert run.code == 2 and "'cc' -> " in run.err and run.err.count("\n") == 1
    assert {path: path.read_bytes() for path in four_steps.rglob("*") if path.is_file()} == before


def test_eval_only_with_fewer_turns(workplace, data, four_steps):
    """To see how good a trained team's first answers are."""
    run = workplace.run("train_cc.py", *SMALL, "--data", data, "--out_dir", "four", "--eval_only", "--num_turns", 1)
    assert run.code == 0, run.err[-2000:]
    assert " | turns 1 | " in run.out and "trained with other settings: num_turns 2 -> 1." in run.out


@pytest.mark.parametrize("script, flag", [("train_cc.py", "--lr"), ("train_cc.py", "--critic_lr"), ("train_mc.py", "--lr")])
def test_a_gradient_that_is_not_a_number_ends_the_run_and_spoils_nothing(train, script, flag):
    out = train("nan" + script + flag, flag, 1e9, "--steps", 3, "--save_every", 1, "--passes", 1, "--minibatches", 1,
                script=script, code=2)
    state = torch.load(out / "train_state.pt", weights_only=False)
    assert state["progress"]["step"] == 1 and all(weights.isfinite().all() for weights in state["adapters"].values())


def test_resume_wants_the_same_items(train, workplace):
    path = workplace.folder / "changing.jsonl"
    path.write_text('{"string": "I"}\n{"string": "IC", "split": "eval"}\n')
    train("changing", "--data", path, "--steps", 1)
    path.write_text('{"string": "L"}\n{"string": "IC", "split": "eval"}\n')
    run = workplace.run("train_cc.py", *SMALL, "--data", path, "--out_dir", "changing", "--steps", 2, "--resume")
    assert run.code == 2 and "made with other settings: items" in run.err and run.err.count("\n") == 1


def test_a_character_that_a_kill_cut_is_no_obstacle(tmp_path):
    (tmp_path / "samples.txt").write_bytes("=== step 0, a\n=== step 1, é".encode()[:-1])
    truncate_logs(tmp_path, 1, False)
    assert (tmp_path / "samples.txt").read_text() == "=== step 0, a\n=== step 1, \ufffd"


def test_a_run_that_began_meanwhile_is_left_alone(tmp_path):
    args = Namespace(out_dir=str(tmp_path), resume=False, overwrite=False, eval_only=False)
    check_run_folder(args)
    (tmp_path / "config.json").write_text('{"out_dir": "here"}')  # while this one builds its base
    with pytest.raises(ValueError, match="holds another run"):
        open_run_folder(args)


def test_what_may_differ_between_a_run_and_its_continuation(tmp_path):
    saved = dict.fromkeys(["algorithm", "task", "world", "model", "num_agents", "lora_rank", "seed", "lr", "group_size", "lam", "steps",
                           "micro_batch"], 1) | {"out_dir": str(tmp_path), "overwrite": False}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    refused = {"resume": [], "eval_only": []}
    for flag in refused:
        for key in saved.keys() - {"out_dir", "overwrite"}:
            try:
                check_run_folder(Namespace(**saved | {"resume": False, "eval_only": False, flag: True, key: 2}))
            except ValueError as error:
                assert f"{key} 1 -> 2" in str(error)
                refused[flag].append(key)
    assert set(refused["eval_only"]) == {"algorithm", "task", "world", "model", "num_agents", "lora_rank"}
    assert set(refused["resume"]) == set(refused["eval_only"]) | {"seed", "lr", "group_size", "lam"}


@pytest.mark.parametrize("name, value", [("lam", 1.01), ("gamma", -0.01), ("top_p", 1.01), ("top_p", 0), ("temperature", 1001), ("seed", -1)])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        check_ranges(Namespace(batch_size=4, group_size=2, **{name: value}))


def test_errors_of_wandb_are_one_sentence_and_bugs_are_not(capsys):
    """As wandb.init raises them when nobody is logged in."""
    not_logged_in = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})
    with pytest.raises(SystemExit) as end, exit_on_error(ArgumentParser()):
        raise not_logged_in("No API key configured.")
    assert end.value.code == 2 and capsys.readouterr().err == "error: No API key configured.\n"
    for bug in (KeyError("agent"), ValueError("invalid literal")):  # such as those of a new task's code
        with pytest.raises(type(bug)), exit_on_error(ArgumentParser()):
            raise bug


def test_log_text():
    assert log_text({"train/score": 43.7, "x": [1, 0.5]}, ["train/score", "x"]) == "score 43.7 | x [1 0.5]"
    assert log_text({"step": 12345, "return": -1.23456}, ["step", "return"]) == "step 12345 | return -1.235"


def test_overwrite_starts_afresh(train, four_steps, workplace):
    folder = workplace.folder / "over"
    shutil.copytree(four_steps, folder)
    train("over", "--steps", 1, "--overwrite", "--seed", 1)
    assert [line["step"] for line in log_of(folder)] == [0, 1, 1]


@pytest.mark.parametrize("arguments", [
    ["--num_agents", 1], ["--num_turns", 1], ["--lam", 1, "--gamma", 1], ["--batch_size", 1, "--num_turns", 1],
    ["--feedback", "perfect", "--temperature", 0.7, "--top_p", 0.9], ["--critic_tokens", 8, "--minibatches", 3]],
    ids=lambda arguments: " ".join(map(str, arguments)))
def test_a_step_with_other_settings(train, arguments):
    folder = train("other-" + "".join(map(str, arguments)).replace("-", ""), "--steps", 1, *arguments)
    line = train_lines(folder)[0]
    assert line["step"] == 1 and all(value == value for value in line.values())
    assert (line["critic/truncated"] > 0) == ("--critic_tokens" in arguments)


@pytest.mark.parametrize("arguments, fragments", [
    (["--task", "chess"], ["chess", "strbuild"]),
    (["--model", "empty"], ["empty", "model"]),
    (["--model", "no/such-model"], ["no/such-model"]),
    (["--data", "broken.jsonl"], ["broken.jsonl", "line 2"]),
    (["--data", "shapeless.jsonl"], ["shapeless.jsonl", "line 1", "'?'"]),
    (["--data", "missing.jsonl"], ["missing.jsonl"]),
    (["--num_turns", 0], ["num_turns"]),
    (["--num_agents", 0], ["num_agents"]),
    (["--batch_size", 0], ["batch_size"]),
    (["--max_new_tokens", -1], ["max_new_tokens"]),
    (["--temperature", 0], ["temperature"]),
    (["--gamma", 1.5], ["gamma"]),
    (["--lam", -0.1], ["lam"]),
    (["--lr", "nan"], ["lr"]),
    (["--seed", 10 ** 20], ["seed"]),
    (["--model", "tiny,"], ["tiny,"]),
    (["--steps", -1], ["steps"]),
    (["--reward", "late"], ["late", "sparse"]),
    (["--world", "flat"], ["flat", "persistent"]),
    (["--device", "cuda"], ["cuda"]),
    (["--device", "abacus"], ["abacus"]),
    (["--device", "cuda:x"], ["cuda:x"]),
    (["--out_dir", "four"], ["four", "--resume", "--overwrite"]),
    (["--out_dir", "four", "--resume", "--lr", 0.5, "--batch_size", 3], ["lr", "0.5", "batch_size"]),
    (["--out_dir", "never", "--resume"], ["never"]),
    (["--out_dir", "full"], ["full"]),
    (["--out_dir", "a-model", "--overwrite"], ["a-model"]),  # a config.json alone does not make it a run
    (["--out_dir", "a-copy", "--resume", "--overwrite"], ["--resume", "--overwrite"]),
    (["--out_dir", "a-copy", "--resume", "--eval_only"], ["--resume", "--eval_only"]),
    (["--out_dir", "stateless", "--resume", "--steps", 4], ["stateless", "no train_state.pt"]),
    (["--out_dir", "stateless", "--eval_only"], ["stateless", "no train_state.pt"]),
    (["--out_dir", "truncated", "--resume", "--steps", 4], ["train_state.pt", "cannot be read"]),
    (["--out_dir", "five", "--eval_only"], ["five", "holds no run"]),
    (["--out_dir", "full/thesis.txt/run"], ["thesis.txt"]),
    (["--num_turns", 10 ** 9], ["num_turns", "1000"]),
    (["--lora_rank", 10 ** 9], ["lora_rank"]),
    (["--threads", 10 ** 6], ["threads"]),
    pytest.param(["--wandb"], ["pip install wandb"], marks=pytest.mark.skipif(find_spec("wandb"), reason="it is there")),
], ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "")
def test_bad_input_is_one_sentence_and_nothing_is_built(workplace, data, four_steps, arguments, fragments):
    files = workplace.folder
    (files / "empty").mkdir(exist_ok=True)
    (files / "full").mkdir(exist_ok=True)
    (files / "full" / "thesis.txt").write_text("mine")
    shutil.copytree(workplace.tiny, files / "a-model", dirs_exist_ok=True)
    for name in ("a-copy", "stateless", "truncated"):
        shutil.copytree(four_steps, files / name, dirs_exist_ok=True)
    os.remove(files / "stateless" / "train_state.pt")
    (files / "truncated" / "train_state.pt").write_bytes((four_steps / "train_state.pt").read_bytes()[:5000])
    (files / "five").mkdir(exist_ok=True)
    (files / "five" / "config.json").write_text("5")
    (files / "broken.jsonl").write_text('{"string": "CAT"}\n{"string": "DOG"\n')
    (files / "shapeless.jsonl").write_text('{"string": "D?G"}\n')
    kept = {path: path.read_bytes() for path in four_steps.rglob("*") if path.is_file()}
    new = "new" + "".join(map(str, arguments)).replace("/", "-")
    out_dir = [] if "--out_dir" in arguments else ["--out_dir", new]
    run = workplace.run("train_cc.py", *SMALL, "--data", data, "--steps", 0, *out_dir, *arguments)
    assert run.code == 2, run.err[-2000:]
    assert run.err.count("\n") == 1, run.err
    assert [word for word in fragments if word not in run.err] == []
    assert not (files / new).exists() and not (files / "never").exists() and os.listdir(files / "full") == ["thesis.txt"]
    assert os.path.exists(files / "a-model" / "model.safetensors")
    assert all(same_weights(files / name, four_steps) for name in ("a-copy", "stateless", "truncated"))
    assert {path: path.read_bytes() for path in four_steps.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("arguments, fragments", [
    (["--group_size", 3], ["group_size 3", "batch_size 4"]),
    (["--group_size", 1], ["group", "at least 2"]),
    (["--group_size", 1, "--baseline", "loo"], ["loo", "at least 2"]),
    (["--group_size", 0], ["group_size"]),
    (["--tree"], ["--tree", "= 16 episodes", "batch_size 4"]),
    (["--baseline", "mean"], ["mean", "loo"]),
], ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "")
def test_groups_that_make_no_sense(workplace, data, arguments, fragments):
    run = workplace.run("train_mc.py", *SMALL, "--data", data, "--out_dir", "no-group", *arguments)
    assert run.code == 2 and run.err.count("\n") == 1 and not (workplace.folder / "no-group").exists()
    assert [word for word in fragments if word not in run.err] == []
    if "--group_size" in arguments and arguments[1] != 1:
        run = workplace.run("train_cc.py", *SMALL, "--data", data, "--out_dir", "no-group", *arguments)
        assert run.code == 2 and [word for word in fragments if word not in run.err] == []
    single = workplace.run("train_mc.py", *SMALL, "--data", data, "--out_dir", "no-group", "--eval_only", "--group_size", 1,
                           "--baseline", "none", "--num_agents", 1)
    assert single.code == 0 and "eval step 0" in single.out, single.err[-2000:]


# --- the trained team at work -----------------------------------------------------------------------------------------

def test_play(workplace, four_steps):
    run = workplace.run("model.py", "four", "--string", "li", "--seed", 2 ** 63 - 1)
    assert run.code == 0, run.err[-2000:]
    assert "LI" in run.out and "turn 1 | agent 1" in run.out and "score" in run.out.splitlines()[-1]


def test_play_is_each_agent_with_its_own_adapter_history_and_generator(workplace, four_steps):
    folder = workplace.folder / "apart"
    shutil.copytree(four_steps, folder)
    config = json.loads((folder / "config.json").read_text()) | {"temperature": 0.7, "top_p": 0.9}
    (folder / "config.json").write_text(json.dumps(config))
    lms = [LanguageModel(workplace.tiny, rank=4) for _ in range(2)]
    for i, lm in enumerate(lms):
        torch.manual_seed(i)
        for p in lm.add_adapter(f"agent_{i}"):
            torch.nn.init.normal_(p, std=0.1)
        lm.save_adapter(f"agent_{i}", str(folder))
    run = workplace.run("model.py", "apart", "--string", "LI", "--seed", 5)
    assert run.code == 0, run.err[-2000:]
    task, episode, generators = get_task("strbuild", num_turns=2), Episode({"string": "LI"}), [
        torch.Generator().manual_seed(5000 + i) for i in range(2)]
    for t in range(2):
        responses = []
        for i, lm in enumerate(lms):
            tokens, _ = lm.generate([f"agent_{i}"], [lm.render(history(task, episode, i))],
                                    torch.rand(1, 24, generator=generators[i]), 0.7, 0.9)
            responses += lm.decode(tokens)
        episode.turns.append(Turn(None, None, None, responses, task.judge(episode.item, responses, t)))
    assert dialogue(task, episode, False) in run.out


def test_play_with_nothing_to_play(workplace, four_steps):
    shutil.copytree(four_steps, workplace.folder / "alien")
    (workplace.folder / "alien" / "config.json").write_text("{}")
    for arguments, message in [(["nowhere"], "nowhere"), (["four", "--string", "D?G"], "'?'"),
                            ([workplace.tiny], "tiny-strbuild"), (["four", "--device", "cuda:99"], "cuda:99"),
                            (["alien"], "something else")]:
        run = workplace.run("model.py", *arguments)
        assert run.code == 2 and run.err.count("\n") == 1 and message in run.err, run.err


def test_play_builds_no_base(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="out/tiny-strbuild is not here"):
        model_folders("tiny", get_task("strbuild"), build=False)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads a process's children from /proc")
def test_ctrl_c_ends_play_and_its_agents_without_a_word(workplace, four_steps):
    play = subprocess.Popen([sys.executable, str(ROOT / "model.py"), "four"], cwd=workplace.folder, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)
    while play.poll() is None and len(Path(f"/proc/{play.pid}/task/{play.pid}/children").read_text().split()) < 2:
        time.sleep(0.1)
    time.sleep(1)  # until both have been started; they are loading their libraries
    os.killpg(play.pid, signal.SIGINT)
    assert play.communicate(timeout=60) == ("", "")  # its agents have closed their ends, too
    assert play.returncode == -signal.SIGINT


def test_play_ends_when_an_agent_cannot_start(workplace, four_steps):
    shutil.copytree(four_steps, workplace.folder / "maimed")
    shutil.rmtree(workplace.folder / "maimed" / "agent_1")
    run = workplace.run("model.py", "maimed", timeout=50)
    assert run.code == 2 and run.err.startswith("error: maimed/agent_1 cannot be used: ") and run.err.count("\n") == 1
