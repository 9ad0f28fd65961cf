"""
CoLLM-CC: n language models learn to collaborate without communicating, with one centralized critic.

One training step, in the notation of arXiv 2601.21972:
 1. Play B episodes. At turn t agent i samples its answer a_i,t ~ pi_i(. | h_i,t); all agents share the reward r_t.
 2. The critic reads the joint history h_t = (h_0,t, h_1,t, ...) and estimates its value V(h_t).
 3. Advantage of every agent = TD error:     A_t = r_t + gamma V(h_t+1) - V(h_t),   V after the last turn is 0.
 4. Critic:  minimise  mean ((V(h_t) - y_t) / std_t)^2  with the constant target y_t = r_t + gamma V(h_t+1).
 5. Actors:  maximise the mean over answers of the sum over tokens of  min(rho A, clip(rho) A)  with importance ratio
    rho = pi_i now / pi_i then (at sampling); at rho = 1 its gradient is that of  mean A log pi_i(a_i,t | h_i,t).
Execution is decentralized: each agent acts with its own adapter on its own history, and no critic is left.

What differs from the paper and its official code: LoRA adapters on one frozen base instead of full models; several
clipped updates per batch instead of one; linear decay of the actors' learning rate to 0; gradient-norm clipping at 1;
advantages normalised over the whole step; temperature 1; a step whose returns are all equal leaves the actors alone;
one output of V per turn t, in units of std_t, the running standard deviation of returns (PopArt).

    python train_cc.py --task strbuild       # 5 to 8 minutes on 2 CPU cores, no download
    ... --model Qwen/Qwen3-4B-Instruct-2507 --max_new_tokens 512 ...          # the same on one GPU: see README
    torchrun --nproc_per_node=2 ... --threads 1   # on two processes or GPUs, with twice the episodes per step
    python model.py out/cc-strbuild          # run the trained team
"""
import argparse
import os
import random
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from critic import Critic, explained_variance_stats, mean, returns_differ, summary
from model import all_gather, init_distributed, load_models, memory_gb, optimizer_step, shard
from tasks import (TASK_OPTIONS, TASKS, Episode, Run, Turn, dialogue, eval_defaults, exit_on_error, get_task, history,
                   minibatches, number)

ALGORITHM = "cc"

# --- arguments --------------------------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 usage="%(prog)s [--task T] [--model M] [--steps N] ...   (--help lists all)")
natural, share, rate = number(int, 1), number(float, 0, 1), number(float, 0)
group = parser.add_argument_group("model")
group.add_argument("--model", default="tiny", help="tiny (built on first use), a folder or id of a causal LM, or A,B")
group.add_argument("--lora_rank", type=natural, default=16, help="rank of every LoRA adapter (default 16)")
group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
group.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the base (default bfloat16 on a GPU only)")
group.add_argument("--compile", action="store_true", help="compile the decoding step (for GPUs; slow at first)")
group.add_argument("--threads", type=natural, default=None, help="CPU threads (default: torch's choice)")
group = parser.add_argument_group("task")
group.add_argument("--task", default="strbuild", help=f"one of {', '.join(TASKS)} (default strbuild)")
group.add_argument("--num_agents", type=natural, default=2, help="agents in the team: 2 (default), 1, or the task's")
group.add_argument("--num_turns", type=natural, default=None, help="maximum turns per episode (default: the task's)")
group.add_argument("--feedback", default=None, help="shown between turns: position, score, perfect, level (by task)")
group.add_argument("--reward", default="dense", help="dense: at every turn (default); sparse: only at the last one")
group.add_argument("--world", default="rebuilt", help="strbuild: rebuilt every turn (default) or persistent")
group.add_argument("--data", default="builtin", help="builtin, hub (the real data set), or FILE.jsonl of your own")
group = parser.add_argument_group("rollout")
group.add_argument("--batch_size", type=natural, default=None, help="B, episodes per step and process (the task's)")
group.add_argument("--group_size", type=natural, default=1, help="G, episodes on the same item in a step (default 1)")
group.add_argument("--max_new_tokens", type=natural, default=None, help="maximum tokens per answer (the task's)")
group.add_argument("--temperature", type=number(float, 1e-3), help="of sampling and of log pi (the task's)")
group.add_argument("--top_p", type=number(float, 1e-3, 1), default=1.0, help="nucleus sampling (default 1: all tokens)")
group = parser.add_argument_group("optimisation")
group.add_argument("--steps", type=number(int, 0), default=None, help="training steps (default: the task's)")
group.add_argument("--gamma", type=share, default=0.9, help="discount per turn (default 0.9, the paper's)")
group.add_argument("--lam", type=share, default=0.0, help="GAE lambda: 0 = the paper's TD, 1 = return minus value")
group.add_argument("--lr", type=rate, default=None, help="actors' AdamW rate, linear decay to 0 (the task's)")
group.add_argument("--critic_lr", type=rate, default=None, help="critics' AdamW rate, constant (the task's)")
group.add_argument("--critic_tokens", type=natural, default=2048, help="most tokens that a critic reads (default 2048)")
group.add_argument("--passes", type=natural, default=2, help="epochs over a step's batch (default 2)")
group.add_argument("--minibatches", type=natural, default=2, help="optimizer steps per pass (default 2)")
group.add_argument("--micro_batch", type=natural, default=8, help="rows per forward; changes no result (default 8)")
group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, 50%% more compute in updates")
group.add_argument("--clip", type=rate, default=0.2, help="clip range of the importance ratio (default 0.2)")
group.add_argument("--seed", type=number(int, 0), default=0, help="two runs with one seed on one CPU are identical")
group = parser.add_argument_group("logging")
group.add_argument("--out_dir", default=None, help=f"default out/{ALGORITHM}-TASK")
group.add_argument("--eval_every", type=number(int, 0), default=0, help="steps between evaluations (0: first and last)")
group.add_argument("--eval_items", type=natural, default=None, help="held-out items to evaluate on (the task's)")
group.add_argument("--save_every", type=natural, default=5, help="steps between saves (default 5)")
group = group.add_mutually_exclusive_group()
group.add_argument("--resume", action="store_true", help="continue the run in out_dir from its last save")
group.add_argument("--overwrite", action="store_true", help="delete the run in out_dir first")
group.add_argument("--eval_only", action="store_true", help="evaluate the agents in out_dir, or the raw model if none")
args = parser.parse_args()

# --- seed, device, output folder --------------------------------------------------------------------------------------

start_time = time.time()
with exit_on_error():
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    parser.set_defaults(out_dir=args.out_dir or f"out/{ALGORITHM}-{args.task}")
    if args.eval_only:  # acts as in training, unless other settings are given
        parser.set_defaults(**eval_defaults(parser.get_default("out_dir")))
    args = parser.parse_args()  # again, with these defaults
    rank, args.ranks, args.device = init_distributed(args.device)
    task = get_task(args.task, **{name: getattr(args, name) for name in TASK_OPTIONS})
    vars(args).update({name: value for name, value in task.settings().items() if vars(args).get(name, "") is None})
    args.algorithm, args.base, args.items = ALGORITHM, task.base, task.checksum()
    run = Run(args, rank, given)  # the output folder
    torch.set_num_threads(args.threads or torch.get_num_threads())
    lms = load_models(args.model, task, args.max_new_tokens, args.device, args.lora_rank, args.gradient_checkpointing,
                      args.compile, args.dtype)  # one per agent; builds the tiny base if missing
torch.manual_seed(args.seed)  # draws the adapters' weights
rng = random.Random(args.seed)  # draws items and minibatches
generator = torch.Generator().manual_seed(args.seed)  # draws tokens

# --- actors -----------------------------------------------------------------------------------------------------------

agents = range(args.num_agents)
actor_parameters = [p for i in agents for p in lms[i].add_adapter(f"agent_{i}")]
actor_optimizer = torch.optim.AdamW(actor_parameters, args.lr, weight_decay=0, fused=True)

# --- critics ----------------------------------------------------------------------------------------------------------

critics = [Critic(lms[0], "critic", args.num_turns, args.critic_tokens)]  # one for the whole team
reads = [agents]                     # critic c reads the histories of these agents: all of them
critic_of = [0 for i in agents]      # and this one serves agent i
critic_optimizer = torch.optim.AdamW(sum((c.weights for c in critics), []), args.critic_lr, weight_decay=0, fused=True)

# --- save and resume --------------------------------------------------------------------------------------------------

stateful = {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer} | {c.name: c for c in critics}
progress = {"step": 0, "episodes": 0, "joint_actions": 0, "tokens": 0, "wall_s": 0.0, "inputs/truncated": 0}
with exit_on_error():
    if saved := run.prepare({*stateful, "adapters", "rng", "generator", "progress"}):
        for i in agents:
            lms[i].check_base(os.path.join(args.out_dir, f"agent_{i}"))
            lms[i].load_adapter_state(saved["adapters"])
        progress |= saved["progress"]
        if args.resume:
            for name, module in stateful.items():
                module.load_state_dict(saved[name])
            rng.setstate(saved["rng"])
            generator.set_state(saved["generator"].cpu())


def save():
    """train_state.pt, written first, is all that --resume needs; the adapter folders are what the agents need."""
    if rank == 0:
        with exit_on_error():
            run.save({name: module.state_dict() for name, module in stateful.items()} | {
                "adapters": {key: weights for lm in lms for key, weights in lm.adapter_state().items()},
                "rng": rng.getstate(), "generator": generator.get_state(), "progress": progress})
            for i in agents:
                lms[i].save_adapter(f"agent_{i}", args.out_dir)
            for critic in critics:
                critic.save(args.out_dir)


def stop_if_interrupted():
    """After Ctrl-C or SIGTERM, which fill run.interrupts: save and end."""
    if all_gather(run.interrupts):
        if not args.eval_only:
            save()
            print(f"interrupted: saved {args.out_dir} at step {progress['step']}; continue with --resume")
        sys.exit(130)

# --- rollout ----------------------------------------------------------------------------------------------------------

def rollout(items, generator):
    """Play one episode per item, each rank its shard of them; all unfinished episodes sample a turn in one batch."""
    episodes = [Episode(item) for item in shard(items)]
    for t in range(args.num_turns):
        uniforms = shard(torch.rand(len(items), args.num_agents, args.max_new_tokens, generator=generator))
        running = [k for k, e in enumerate(episodes) if not (e.turns and e.turns[-1].outcome.done)]
        if not running:
            continue  # not break: all ranks' generators stay in sync
        histories = [[history(task, episodes[k], i) for i in agents] for k in running]  # [episode][agent]
        prompts = [[lms[i].render(h[i], lms[i].context - args.max_new_tokens) for h in histories] for i in agents]
        sampled = zip(*(lms[i].generate(f"agent_{i}", prompts[i], uniforms[running, i], args.temperature, args.top_p)
                        for i in agents))  # tokens, logps, texts, each [agent][episode]
        prompts, tokens, logps, responses = ([list(own) for own in zip(*by_agent)] for by_agent in (prompts, *sampled))
        items_now, worlds = zip(*((episodes[k].item, episodes[k].world) for k in running))
        with exit_on_error():
            outcomes = task.judge_all(items_now, responses, t, worlds)  # all of these are [episode][agent]
        for k, h, *turn in zip(running, histories, prompts, tokens, logps, responses, outcomes):
            read = [critic.input_ids([h[i] for i in reads[c]]) for c, critic in enumerate(critics)]
            episodes[k].turns.append(Turn(*turn, read))
    return all_gather(episodes)

# --- targets and advantages -------------------------------------------------------------------------------------------

def td_targets(rewards, values):
    """(targets, advantages) of one episode: A_t, and V(h_t) + A_t, which is r_t + gamma V(h_t+1) if lambda is 0.

    A_t = TD error + gamma lambda A_t+1: lambda 0 is the paper's, 1 the return minus the value (GAE, arXiv 1506.02438).
    Rewards [1, 2], values [0.5, 1.0] and gamma 0.9: TD errors and advantages [1.4, 1.0], hence targets [1.9, 2.0].
    """
    advantages, next_value, advantage = [], 0.0, 0.0  # V after the last turn is 0
    for reward, value in zip(reversed(rewards), reversed(values)):
        td_error = reward + args.gamma * next_value - value  # r_t + gamma V(h_t+1) - V(h_t)
        advantage = td_error + args.gamma * args.lam * advantage
        advantages.insert(0, advantage)
        next_value = value
    return [value + advantage for value, advantage in zip(values, advantages)], advantages


def set_targets(episodes, returns):
    """Steps 2 to 4 of the header: V of every history, once, its target and its advantage, constants from here on."""
    for c, critic in enumerate(critics):
        critic.set_scale(returns)  # returns give V its scale, nothing else
        critic.set_values(episodes, c, args.micro_batch)
        for e in episodes:
            targets, advantages = td_targets(e.rewards, [turn.values[c] for turn in e.turns])
            for turn, target, advantage in zip(e.turns, targets, advantages):
                turn.targets.append(target)
                turn.advantages.append(advantage)


def set_advantages(episodes):
    """Give each agent its advantages, normalised over the step; returns the explained variance, for the log."""
    returns, turns = [e.returns(args.gamma) for e in episodes], [turn for e in episodes for turn in e.turns]
    set_targets(episodes, returns)
    raw = torch.tensor([[turn.advantages[c] for c in critic_of] for turn in turns])  # (turns, agents)
    raw -= raw.mean()
    scaled = raw / (raw.square().mean().sqrt() + 1e-6) * returns_differ(returns)  # all 0 if none does
    for turn, advantages in zip(turns, scaled.tolist()):
        turn.advantages = advantages  # from here on one for each agent
    return explained_variance_stats(returns, episodes)

# --- update -----------------------------------------------------------------------------------------------------------

def micro_batches(episodes, input_ids):
    """This rank's shard of the episodes' turns, (episode, t), as lists of at most args.micro_batch of them.

    Episodes are sorted by the token ids input_ids(turn) of their first turn: rows that share a prefix are neighbours.
    """
    rows = [(e, t) for e in shard(sorted(episodes, key=lambda e: input_ids(e.turns[0]))) for t in range(len(e.turns))]
    return [rows[k:k + args.micro_batch] for k in range(0, len(rows), args.micro_batch)]


def update_critics(episodes):
    """Step 4 of the header: squared error to the targets, in units of the returns' standard deviation at that turn."""
    total, updates = 0.0, 0
    for c, critic in list(enumerate(critics)) * args.passes:  # each critic once per pass
        for minibatch in minibatches(episodes, args.group_size, args.minibatches, rng):
            num_histories = sum(len(e.turns) for e in minibatch)
            for batch in micro_batches(minibatch, lambda turn: turn.critic_inputs[c]):
                turn_index = [t for _, t in batch]
                values = critic([e.turns[t].critic_inputs[c] for e, t in batch], turn_index)  # (B,)
                targets = torch.tensor([e.turns[t].targets[c] for e, t in batch], device=args.device)  # (B,)
                loss = (((values - targets) / critic.std[turn_index]) ** 2).sum() / num_histories
                loss.backward()
                total += loss.item()
            optimizer_step(critic_optimizer, critic.weights)  # the others have no gradients: AdamW skips them
            updates += 1
    return {"loss/value": sum(all_gather([total])) / updates}


def update_actors(episodes):
    """Step 5 of the header. Normalised by the number of answers in the minibatch, whatever the micro-batch size."""
    total, entropies, norms = 0.0, [], []  # entropies: (sum, count) per micro-batch
    for _ in range(args.passes):
        for minibatch in minibatches(episodes, args.group_size, args.minibatches, rng):
            num_answers = sum(len(e.turns) for e in minibatch) * len(agents)
            for i in agents:
                for batch in micro_batches(minibatch, lambda turn: turn.prompts[i]):
                    turns = [e.turns[t] for e, t in batch]
                    tokens = [turn.tokens[i] for turn in turns]
                    logp, entropy = lms[i].logprobs(f"agent_{i}", [turn.prompts[i] for turn in turns], tokens,
                                                    args.temperature)  # (N,), N tokens in all
                    old_logp = torch.tensor([x for turn in turns for x in turn.logps[i]], device=args.device)
                    advantage = torch.tensor([turn.advantages[i] for turn, own in zip(turns, tokens) for _ in own],
                                             device=args.device)
                    ratio = (logp - old_logp).exp()  # importance ratio rho
                    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                    loss = -torch.min(ratio * advantage, clipped * advantage).sum() / num_answers
                    loss.backward()
                    total += loss.item()
                    entropies.append((entropy.sum().item(), len(entropy)))
            norms.append(optimizer_step(actor_optimizer, actor_parameters))
    entropy, num_tokens = map(sum, zip(*all_gather(entropies)))
    return {"loss/policy": sum(all_gather([total])) / len(norms), "policy/entropy": entropy / num_tokens,
            "policy/grad_norm": mean(norms)}

# --- evaluate ---------------------------------------------------------------------------------------------------------

def evaluate(show=False):
    """Play eval_items held-out items; all go to samples.jsonl, four to samples.txt; show: print the first one's end."""
    started, episodes, items = time.time(), [], task.eval_items[:args.eval_items]
    size = args.batch_size * args.ranks * (2 if lms[0].is_small else 1)  # at once; an interrupt waits for them
    eval_generator = torch.Generator().manual_seed(1234)
    for k in tqdm(range(0, len(items), size), "held-out items", leave=False, disable=rank > 0 or None):
        episodes += rollout(items[k:k + size], eval_generator)
        stop_if_interrupted()
    line = progress | summary(episodes, "eval", args.gamma, [lm.ends for lm in lms])
    if not args.eval_only:
        run.log(line, task, episodes)
    run.show(line, time.time() - started)
    if show:
        print(f"\n{episodes[0].item}\n{dialogue(task, episodes[0], os.isatty(1), last=True)}")

# --- training loop ----------------------------------------------------------------------------------------------------

run.catch_interrupts()
if args.eval_only:
    evaluate(show=True)
    sys.exit()
bar = tqdm(range(progress["step"], args.steps), initial=progress["step"], total=args.steps, unit="step",
           dynamic_ncols=True, disable=rank > 0 or None)
for step in bar:
    if step == 0 or args.eval_every and step % args.eval_every == 0:
        evaluate()
    t0 = time.time()
    actor_optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
    for lm in lms:
        lm.truncated = 0  # truncations in evaluations do not count
    items = [rng.choice(task.train_items) for _ in range(args.batch_size * args.ranks // args.group_size)]
    episodes = rollout([item for item in items for _ in range(args.group_size)], generator)
    t1 = time.time()
    with exit_on_error():
        stats = set_advantages(episodes) | update_critics(episodes) | update_actors(episodes)
    t2 = time.time()
    new_tokens = sum(len(tokens) for e in episodes for turn in e.turns for tokens in turn.tokens)
    progress["step"] = step + 1
    for name, increment in [("episodes", len(episodes)), ("joint_actions", sum(len(e.turns) for e in episodes)),
                            ("tokens", new_tokens), ("wall_s", t2 - t0),
                            ("inputs/truncated", sum(all_gather([lm.truncated for lm in set(lms)])))]:
        progress[name] += increment
    line = progress | summary(episodes, "train", args.gamma, [lm.ends for lm in lms]) | stats | {
        "time/rollout_s": t1 - t0, "time/update_s": t2 - t1, "memory_gb": memory_gb(args.device)}
    run.log(line)
    run.show(line, t2 - t0, progress["wall_s"] / (step + 1) * (args.steps - step - 1))
    stop_if_interrupted()
    if (step + 1) % args.save_every == 0:
        save()
save()
evaluate(show=True)
if rank == 0:  # the report in a process of its own: whatever goes wrong there does the run no harm
    subprocess.run([sys.executable, os.path.join(os.path.dirname(__file__), "results", "report.py"), args.out_dir])
first, last = run.evaluations()
print(f"{args.out_dir}: agent_*/ are the trained agents (PEFT adapters), log.jsonl every number, samples.jsonl whole "
      f"episodes,\nreport.html pictures and the learning curve. Next: python model.py {args.out_dir}\nheld-out score "
      f"{first['eval/score']:.1f} -> {last['eval/score']:.1f}, reward {first['eval/reward']:.2f} -> "
      f"{last['eval/reward']:.2f}, {time.time() - start_time:.0f} s")
