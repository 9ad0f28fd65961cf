"""
CoLLM-DC: n language models learn to collaborate without communicating, each with a critic of its own.

One training step, in the notation of arXiv 2601.21972:
 1. Play B episodes. At turn t agent i samples its answer a_i,t ~ pi_i(. | h_i,t); all agents share the reward r_t.
 2. Agent i's critic reads only agent i's own history h_i,t and estimates its value V_i(h_i,t).
 3. Advantage of agent i = TD error:  A_i,t = r_t + gamma V_i(h_i,t+1) - V_i(h_i,t),  V_i after the last turn is 0.
 4. Critics: minimise  mean ((V_i(h_i,t) - y_i,t) / std_t)^2  with the constant target y_i,t = r_t + gamma V_i(h_i,t+1).
 5. Actors:  maximise the mean over answers of the sum over tokens of  min(rho A, clip(rho) A)  with importance ratio
    rho = pi_i / pi_i at sampling; at rho = 1 (first minibatch) the gradient is that of  mean A log pi_i(a_i,t | h_i,t).
After training the critics are discarded: each agent acts with its own adapter on its own history.

What differs from the paper and its official code: LoRA adapters on one frozen base instead of full models; several
clipped updates per batch instead of one; linear decay of the actors' learning rate to 0; gradient-norm clipping at 1;
advantages normalised over the whole step; one output of V per turn t, in units of std_t, the first step's return std;
values from a critic's first forward over a minibatch, after its updates on the step's earlier ones; temperature 1.

    python train_dc.py --task strbuild                 # 3 to 5 minutes on 2 CPU cores, score 44 -> 91; no download
    python train_dc.py --model Qwen/Qwen3-4B-Instruct-2507 --max_new_tokens 512 ...   # one GPU: see README
    torchrun --nproc_per_node=2 train_dc.py --threads 1   # two processes or GPUs, twice the episodes per step
    python model.py out/dc-strbuild                    # run the trained team
"""
import argparse
import json
import os
import random
import signal
import sys
import time

import torch
from tqdm import tqdm

from critic import Critic, explained_variance_stats, td_targets
from model import (all_gather, check_model, generate, init_distributed, load_models, load_state, memory_gb,
                   micro_batches, optimizer_step)
from tasks import (TASK_OPTIONS, TASKS, Episode, Turn, catch_interrupts, check_ranges, check_run_folder, dialogue,
                   exit_on_error, get_task, history, log_text, mean, minibatches, open_run_folder, summary,
                   truncate_logs, write_atomic)

ALGORITHM = "dc"

# --- arguments --------------------------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
group = parser.add_argument_group("model")
group.add_argument("--model", default="tiny", help="tiny (built on first use), a folder or id of a causal LM, or A,B")
group.add_argument("--lora_rank", type=int, default=16, help="rank of every LoRA adapter (default 16)")
group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
group.add_argument("--attn", default=None, help="sdpa, eager, flash_attention_2, ... (default: the model's own)")
group.add_argument("--compile", action="store_true", help="torch.compile the layers for sampling (GPU; slow at first)")
group.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
group = parser.add_argument_group("task")
group.add_argument("--task", default="strbuild", help=f"one of {', '.join(TASKS)} (default strbuild)")
group.add_argument("--num_agents", type=int, default=2, help="agents in the team: 2 (default), 1, or what the task has")
group.add_argument("--num_turns", type=int, default=None, help="maximum turns per episode (default: the task's)")
group.add_argument("--feedback", default=None, help="shown between turns: position, score, perfect, level (by task)")
group.add_argument("--reward", default="dense", help="dense: at every turn (default); sparse: only at the last one")
group.add_argument("--world", default="rebuilt", help="strbuild: rebuilt every turn (default) or persistent")
group.add_argument("--data", default="builtin", help="builtin, hub (the real data set), or FILE.jsonl of your own")
group = parser.add_argument_group("rollout")
group.add_argument("--batch_size", type=int, default=None, help="B, episodes per step and process (default: by task)")
group.add_argument("--max_new_tokens", type=int, default=None, help="maximum tokens per answer (default: the task's)")
group.add_argument("--temperature", type=float, default=1.0, help="of sampling and of log pi (default 1: unbiased)")
group.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling (default 1: all tokens, unbiased)")
group = parser.add_argument_group("optimisation")
group.add_argument("--steps", type=int, default=None, help="training steps (default: the task's)")
group.add_argument("--gamma", type=float, default=0.9, help="discount per turn (default 0.9, the paper's)")
group.add_argument("--lam", type=float, default=0.0, help="GAE lambda: 0 = the paper's TD, 1 = return minus value")
group.add_argument("--group_size", type=int, default=1, help="G, episodes on the same item in a step (default 1)")
group.add_argument("--lr", type=float, default=None, help="actors' AdamW rate, linear decay to 0 (default: by task)")
group.add_argument("--critic_lr", type=float, default=2e-3, help="critics' AdamW rate, constant (default 2e-3)")
group.add_argument("--passes", type=int, default=2, help="epochs over a step's batch (default 2)")
group.add_argument("--minibatches", type=int, default=2, help="optimizer steps per pass (default 2)")
group.add_argument("--micro_batch", type=int, default=8, help="rows per forward; does not change results (default 8)")
group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, 50%% more compute in updates")
group.add_argument("--clip", type=float, default=0.2, help="clip range of the importance ratio (default 0.2)")
group.add_argument("--critic_tokens", type=int, default=2048, help="maximum tokens of a critic's input (default 2048)")
group.add_argument("--seed", type=int, default=0, help="two runs with one seed on one CPU are identical (default 0)")
group = parser.add_argument_group("logging")
group.add_argument("--out_dir", default=None, help=f"default out/{ALGORITHM}-TASK")
group.add_argument("--eval_every", type=int, default=0, help="steps between evaluations (default 0: first and last)")
group.add_argument("--save_every", type=int, default=5, help="steps between saves (default 5)")
group.add_argument("--resume", action="store_true", help="continue the run in out_dir from its last save")
group.add_argument("--overwrite", action="store_true", help="delete the run in out_dir first")
group.add_argument("--eval_only", action="store_true", help="evaluate the agents in out_dir, or the raw model if none")
group.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
args = parser.parse_args()
args.algorithm = ALGORITHM
with exit_on_error(parser):  # user errors, as far as they show before anything is built or loaded
    rank, args.ranks, args.device = init_distributed(args.device)
    task = get_task(args.task, **{name: getattr(args, name) for name in TASK_OPTIONS})
    check_model(args.model, args.num_agents)
    vars(args).update({name: value for name, value in task.settings().items() if vars(args).get(name) is None})
    check_ranges(args)
    args.out_dir = args.out_dir or os.path.join("out", f"{ALGORITHM}-{args.task}")
    check_run_folder(args)
    if args.wandb:
        import wandb
print("\n".join(f"{name:>15}: {value}" for name, value in vars(args).items()))

# --- seed, device, output folder --------------------------------------------------------------------------------------

start_time = time.time()
signal.signal(signal.SIGINT, lambda *_: (print("interrupted: there was nothing to save yet"), sys.exit(130)))
torch.set_num_threads(args.threads or torch.get_num_threads())
with exit_on_error(parser):
    lms = load_models(args.model, task, args.max_new_tokens, args.device, args.lora_rank, args.attn,
                      args.gradient_checkpointing, args.compile)  # one per agent; builds the tiny base if missing
    if not args.eval_only and rank == 0:
        if args.wandb:
            wandb.init(project="nanocollm", name=os.path.basename(args.out_dir), config=vars(args))
        open_run_folder(args)
torch.manual_seed(args.seed)
rng = random.Random(args.seed)  # draws items and minibatches
generator = torch.Generator().manual_seed(args.seed)  # draws tokens

# --- actors -----------------------------------------------------------------------------------------------------------

agents = range(args.num_agents)
actor_parameters = [p for i in agents for p in lms[i].add_adapter(f"agent_{i}")]

# --- critics ----------------------------------------------------------------------------------------------------------

critics = [Critic(lms[i], f"critic_{i}", args.num_turns, args.critic_tokens) for i in agents]  # one for each agent
reads = [[i] for i in agents]        # critic k reads the histories of these agents: agent k alone
critic_of = [i for i in agents]      # and this one serves agent i
critic_parameters = [p for critic in critics for p in critic.weights]

# --- optimizers and resume --------------------------------------------------------------------------------------------

actor_optimizer = torch.optim.AdamW(actor_parameters, lr=args.lr, weight_decay=0.0, fused=True)
critic_optimizer = torch.optim.AdamW(critic_parameters, lr=args.critic_lr, weight_decay=0.0, fused=True)
stateful = {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer} | {c.name: c for c in critics}
progress = {"step": 0, "episodes": 0, "joint_actions": 0, "tokens": 0, "wall_s": 0.0, "prompt/truncated": 0,
            "critic/truncated": 0}
log_path, state_path = os.path.join(args.out_dir, "log.jsonl"), os.path.join(args.out_dir, "train_state.pt")
if saved := (args.resume or args.eval_only) and os.path.exists(state_path):
    with exit_on_error(parser):
        saved = load_state(state_path, args.device)
        for i in agents:
            lms[i].check_base(os.path.join(args.out_dir, f"agent_{i}"))
            lms[i].load_adapter_state(saved["adapters"])
    progress |= saved["progress"]
    print(f"{args.out_dir} was saved at step {progress['step']}")
if saved and args.resume:
    for name, module in stateful.items():
        module.load_state_dict(saved[name])
    rng.setstate(saved["rng"])
    generator.set_state(saved["generator"].cpu())


def save():
    """train_state.pt, written first, is all that --resume needs; the adapter folders are what the agents need."""
    if rank == 0:
        with exit_on_error(parser):
            state = {name: module.state_dict() for name, module in stateful.items()} | {
                "adapters": {key: weights for lm in lms for key, weights in lm.adapter_state().items()},
                "rng": rng.getstate(), "generator": generator.get_state(), "progress": progress}
            write_atomic(state_path, lambda path: torch.save(state, path))
            for i in agents:
                lms[i].save_adapter(f"agent_{i}", args.out_dir)
            for critic in critics:
                critic.save(args.out_dir)


def log(line):
    if rank == 0:
        with exit_on_error(parser), open(log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if args.wandb:
            wandb.log(line, step=line["step"])

# --- rollout ----------------------------------------------------------------------------------------------------------

def rollout(items, generator):
    """Play one episode per item, each rank its shard of them; all unfinished episodes sample a turn in one batch."""
    shard = slice(len(items) * rank // args.ranks, len(items) * (rank + 1) // args.ranks)
    episodes, prompt_cache = [Episode(item) for item in items[shard]], {}  # KV cache of each row's first prompt
    for t in range(args.num_turns):
        uniforms = torch.rand(len(items), args.num_agents, args.max_new_tokens, generator=generator)[shard]
        running = [k for k, e in enumerate(episodes) if not (e.turns and e.turns[-1].outcome.done)]
        if not running:
            continue  # not break: all ranks' generators stay in sync
        histories = {k: [history(task, episodes[k], i) for i in agents] for k in running}
        rows = [(k, i) for i in agents for k in running]  # agent by agent
        prompts = [lms[i].render(histories[k][i], args.max_new_tokens) for k, i in rows]
        tokens, logps, texts = generate(lms, rows, prompts, torch.stack([uniforms[k, i] for k, i in rows]),
                                        args.temperature, args.top_p, prompt_cache)
        answers = [texts[n::len(running)] for n in range(len(running))]  # per episode, one of each agent
        outcomes = task.judge_all([episodes[k].item for k in running], answers, t, [episodes[k].world for k in running])
        for n, k in enumerate(running):
            own = slice(n, None, len(running))  # this episode's rows, one per agent
            episodes[k].turns.append(Turn(prompts[own], tokens[own], logps[own], answers[n], outcomes[n],
                                          [critic.input_ids([histories[k][i] for i in reads[c]])
                                           for c, critic in enumerate(critics)]))
    return all_gather(episodes)

# --- targets and advantages -------------------------------------------------------------------------------------------

def td(e, c, t=0):
    """(targets, advantages) of an episode's turns from t on, two lists; critic c has evaluated these turns."""
    return td_targets(e.rewards[t:], [turn.values[c] for turn in e.turns[t:]], args.gamma, args.lam)


def set_advantages(episodes):
    """Step 3 of the header, with V from before it learned from an episode; returns V's explained variance, to log."""
    turns = [turn for e in episodes for turn in e.turns]
    for e in episodes:
        for turn, td_errors in zip(e.turns, zip(*(td(e, c)[1] for c in critic_of))):  # td_errors: one per agent
            turn.advantages = td_errors
    raw = torch.tensor([turn.advantages for turn in turns])  # (turns, agents)
    center, std = raw.mean().item(), raw.std(correction=0).item() + 1e-6
    for turn in turns:
        turn.advantages = [(advantage - center) / std for advantage in turn.advantages]
    values = [[turn.values[c] for turn in e.turns] for c in range(len(critics)) for e in episodes]
    return explained_variance_stats([e.returns(args.gamma) for e in episodes] * len(critics), values)

# --- update -----------------------------------------------------------------------------------------------------------

def update_critics(episodes):
    """Steps 2 and 4 of the header: squared error to the targets, in units of the returns' variance at that turn.

    One forward pass gives V(h_t) for the advantages and the critic's first gradient. Turns are processed from last to
    first, so that V(h_t+1) is known for the target of h_t.
    """
    total, updates = 0.0, 0
    if progress["step"] == 0:
        for critic in critics:
            critic.set_scale([e.returns(args.gamma) for e in episodes])
    for c, critic in list(enumerate(critics)) * args.passes:  # each critic once per pass
        for minibatch in minibatches(episodes, args.group_size, args.minibatches, rng):
            num_histories = sum(len(e.turns) for e in minibatch)
            for batch in micro_batches(minibatch, lambda turn: turn.critic_inputs[c], args.micro_batch):
                turn_index = [t for _, t in batch]
                values = critic([e.turns[t].critic_inputs[c] for e, t in batch], turn_index)  # (B,)
                for (e, t), value in zip(batch, values.tolist()):
                    e.turns[t].values.setdefault(c, value)  # first pass only: later it has learned from this episode
                targets = torch.tensor([td(e, c, t)[0][0] for e, t in batch], device=args.device)  # (B,)
                loss = (((values - targets) / critic.std[turn_index]) ** 2).sum() / num_histories
                loss.backward()
                total += loss.item()
            optimizer_step(critic_optimizer, critic.weights)
            updates += 1
        for k, t, value in all_gather([(k, t, turn.values[c]) for k, e in enumerate(episodes)
                                       for t, turn in enumerate(e.turns) if c in turn.values]):  # from all ranks
            episodes[k].turns[t].values[c] = value
    return {"loss/value": sum(all_gather([total])) / updates}


def update_actors(episodes):
    """Step 5 of the header. Normalised by the number of answers in the minibatch, whatever the micro-batch size."""
    total, entropies, norms = 0.0, [], []  # entropies: (sum, count) per micro-batch
    for _ in range(args.passes):
        for minibatch in minibatches(episodes, args.group_size, args.minibatches, rng):
            num_answers = sum(len(e.turns) for e in minibatch) * len(agents)
            for i in agents:
                for batch in micro_batches(minibatch, lambda turn: turn.prompts[i], args.micro_batch):
                    turns = [e.turns[t] for e, t in batch]
                    tokens = [turn.tokens[i] for turn in turns]
                    logp, entropy = lms[i].logprobs([f"agent_{i}"] * len(turns), [turn.prompts[i] for turn in turns],
                                                    tokens, args.temperature)  # (N,), N tokens in all
                    old_logp = torch.tensor([x for turn in turns for x in turn.logps[i]], device=args.device)
                    advantage = torch.tensor([turn.advantages[i] for turn, a in zip(turns, tokens) for _ in a],
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

def evaluate(show):
    """Play every held-out item once; `show` whole episodes are printed, four go to samples.txt."""
    started = time.time()
    size, eval_gen = args.batch_size * args.ranks, torch.Generator().manual_seed(1234)  # as many at once as in training
    episodes = [e for k in range(0, len(task.eval_items), size) for e in rollout(task.eval_items[k:k + size], eval_gen)]
    line = progress | summary(episodes, "eval", args.gamma, [lm.end for lm in lms])
    if not args.eval_only and rank == 0:
        log(line)
        with exit_on_error(parser), open(os.path.join(args.out_dir, "samples.txt"), "a", encoding="utf-8") as file:
            for e in episodes[:4]:
                file.write(f"=== step {progress['step']}, {e.item}\n{dialogue(task, e, False)}\n")
    for e in episodes[:show]:
        print(f"\n=== {e.item}\n{dialogue(task, e, sys.stdout.isatty())}")
    keys = ["step", *(key for key in line if key.startswith("eval/"))]
    tqdm.write(f"eval {log_text(line, keys)} | {time.time() - started:.1f} s")


def due(step):  # whether to evaluate after this many steps; 0: the untrained team
    return step == 0 or step >= args.steps or args.eval_every > 0 and step % args.eval_every == 0

# --- training loop ----------------------------------------------------------------------------------------------------

if args.eval_only:
    evaluate(show=2)
    sys.exit()
interrupts = catch_interrupts(rank)
if args.resume and rank == 0:
    exit_on_error(parser)(truncate_logs)(args.out_dir, progress["step"] if saved else -1, due(progress["step"]))
bar = tqdm(range(progress["step"], args.steps), initial=progress["step"], total=args.steps, unit="step",
           dynamic_ncols=True, disable=rank > 0)
for step in bar:
    if due(step):
        evaluate(show=0)
    t0 = time.time()
    actor_optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)  # constant for critics, to keep up
    for counter in [*lms, *critics]:
        counter.truncated = 0  # truncations in evaluations do not count
    items = [rng.choice(task.train_items) for _ in range(args.batch_size * args.ranks // args.group_size)]
    episodes = rollout([item for item in items for _ in range(args.group_size)], generator)
    t1 = time.time()
    try:
        stats = update_critics(episodes) | set_advantages(episodes) | update_actors(episodes)  # in this order
    except FloatingPointError as error:
        bar.close()
        parser.exit(2, f"error: {error}\n")
    t2 = time.time()
    new_tokens = sum(len(tokens) for e in episodes for turn in e.turns for tokens in turn.tokens)
    progress["step"] = step + 1
    for name, increment in [("episodes", len(episodes)), ("joint_actions", sum(len(e.turns) for e in episodes)),
                            ("tokens", new_tokens), ("wall_s", t2 - t0),
                            ("prompt/truncated", sum(all_gather([lm.truncated for lm in set(lms)]))),
                            ("critic/truncated", sum(all_gather([critic.truncated for critic in critics])))]:
        progress[name] += increment
    line = progress | summary(episodes, "train", args.gamma, [lm.end for lm in lms]) | stats | {
        "time/rollout_s": t1 - t0, "time/update_s": t2 - t1, "memory_gb": memory_gb(args.device)}
    log(line)
    bar.set_postfix(ret=f"{line['train/return']:.2f}", score=f"{line['train/score']:.1f}",
                    tok_s=f"{new_tokens / (t1 - t0):.0f}")
    tqdm.write(log_text(line, (
        "step", "train/return", "train/score", "train/turns", "train/response_tokens", "policy/entropy",
        "policy/grad_norm", "loss/value", "value/explained_variance_by_turn", "time/rollout_s", "time/update_s",
        "joint_actions")))
    stop = all_gather(interrupts)
    if stop or (step + 1) % args.save_every == 0:
        save()
    if stop:
        print(f"interrupted: saved {args.out_dir} at step {step + 1}; continue with --resume")
        sys.exit(130)
save()
evaluate(show=2)
print(f"\n{args.out_dir}: agent_*/ are the trained agents (PEFT adapters), log.jsonl every number, samples.txt some "
      f"episodes;\n{time.time() - start_time:.0f} s in all. Next: python model.py {args.out_dir}")
