"""
How fast is it? Joint episodes a second of ours, of the official code (comlrl 1.4.3) and of another checkout of ours.

All train one randomly initialised Llama (width 128, 4 layers, float32) on one made-up task: each of two agents reads
about 200 tokens and writes exactly 96, sampled from the whole vocabulary but the special tokens. Every run is a process
of its own, the sides in turn; what comes before the first update is left out; tables show medians over --repeat.

    peer   trains whole models with its defaults: one pass, an update for 8 answers of an agent (cc, dc) or for all
           answers to 2 prompts (mc). Over one turn it samples 4 answers to a prompt. Over several turns cc and dc allow
           one, and mc plays a tree with 2 branches a node (as in its Minecraft runs), whose leaves count as episodes.
    ours   is the train script: 32 episodes a step, adapters of rank 16, the peer's passes, answers to a prompt and
           joint actions an update, in one process and (torchrun) in two that share the threads. Over several turns mc
           plays 2 whole episodes of an item, an update for both: 4 joint actions an episode over four turns, in the
           peer's tree 30 for 16 episodes. So joint actions a second are shown, too.
    also   is ours again, run from the folder that --also names: another commit with the same settings.

    pip install comlrl==1.4.3                               # the peer; nothing else in this repository needs it
    git worktree add out/before COMMIT                      # another commit to compare with
    python results/benchmark.py --also out/before
    python results/benchmark.py --small                     # a few minutes: does it work?
    python results/benchmark.py --model FOLDER --ranks 1    # on a GPU: a real LLM's shape, from scaling.py --build
"""
import argparse
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
AGENTS, EPISODES, SPECIAL = 2, 32, ["<pad>", "<end>", "<unk>", "<user>", "<assistant>"]
SIDES, TRAINERS = ["peer", "ours", "also"], {"cc": "MAAC", "dc": "IAC", "mc": "MAGRPO"}
NORMAL = {"words": 198, "tokens": 96, "steps": 2, "width": 128, "layers": 4}
LARGE = {"words": 40, "tokens": 96, "steps": 2}  # on a GPU
SMALL = {"words": 20, "tokens": 8, "steps": 1, "width": 32, "layers": 2}

# --- the made-up task and its model -----------------------------------------------------------------------------------


def bench_task(words):
    """A task class: an item has `words` words per agent; the reward is the share of words that both answers have."""
    from tasks import Task

    class Bench(Task):
        def builtin_items(self):
            rng = random.Random(0)
            items = [[" ".join(f"w{rng.randrange(1000)}" for _ in range(words)) for _ in range(AGENTS)]
                     for _ in range(257)]
            return items[1:], items[:1]  # evaluations take no time

        def observation(self, item, agent):
            return item[agent]

        def judge(self, item, responses, turn, world=None):
            used = [set(response.split()) for response in responses]
            reward = len(set.intersection(*used)) / max(1, len(set.union(*used)))
            feedback = [f"w{agent} w{turn}" for agent in range(AGENTS)]
            return self.outcome(reward, 100 * reward, {}, turn, False, feedback=feedback)

    return Bench


def build_model(folder, width, layers):
    """A Llama with random weights that knows 1000 words, as an ordinary model folder.

    Answers have a fixed length because special tokens cannot be sampled: hidden unit 0 is the same positive number
    everywhere, nothing adds to it, and the logits of special tokens are large negative multiples of it.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    names = SPECIAL + [f"w{k}" for k in range(1000)]
    words = Tokenizer(models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:], chat_template=(
            "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}> {{ m.content }} <end> {% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}")).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(names), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=2048, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[:len(SPECIAL)] = 0.0
        model.lm_head.weight[:len(SPECIAL), 0] = -1e4
    model.save_pretrained(folder)

# --- the two sides, each in a process of its own ----------------------------------------------------------------------


def ours(job):
    """The train script of job["folder"]; nothing of that folder is used but its flags, its log, TASKS and Task."""
    import tasks
    tasks.TASKS["bench"] = bench_task(job["words"])
    algorithm, turns, ranks, group = (job[name] for name in ("algorithm", "turns", "ranks", "answers"))
    flags = {
        "task": "bench", "model": job["model"], "num_turns": turns, "max_new_tokens": job["tokens"],
        "batch_size": EPISODES // ranks, "group_size": group, "passes": 1,
        "minibatches": min(EPISODES // group, EPISODES * turns // (2 * group if algorithm == "mc" else 8)),
        "threads": max(1, job["threads"] // ranks), "device": job["device"], "out_dir": job["out"],
        "steps": job["steps"] + 1, "save_every": 1000}
    script = os.path.join(job["folder"], f"train_{algorithm}.py")
    sys.argv = [script, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    runpy.run_path(script, run_name="__main__")
    log = map(json.loads, Path(job["out"], "log.jsonl").read_text().splitlines())
    before, *lines = [line for line in log if "time/rollout_s" in line]
    rollout, update = (sum(line[f"time/{part}_s"] for line in lines) for part in ("rollout", "update"))
    episodes, joint_actions = (lines[-1][name] - before[name] for name in ("episodes", "joint_actions"))
    return {"rollout": rollout, "update": update, "seconds": rollout + update, "episodes": episodes,
            "joint actions": joint_actions}


def peer(job):
    """The official trainer on our task: our prompts, our judge as its reward and its feedback between turns."""
    import torch
    from comlrl import trainers
    from transformers import AutoTokenizer
    torch.set_num_threads(job["threads"])
    algorithm, turns, group, gpu = job["algorithm"], job["turns"], job["answers"], job["device"] == "cuda"
    critic = algorithm != "mc"
    task, tokenizer = bench_task(job["words"])(AGENTS, turns), AutoTokenizer.from_pretrained(job["model"])

    def prompt_of(item, agent, *more):  # more: the agent's last answer and the feedback on it
        texts = zip(("user", "assistant", "user"), (task.observation(item, agent), *more))
        messages = [{"role": role, "content": text} for role, text in texts]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def reward(*answers, batch_items):  # answers: one list per agent; an item is known by its number
        item = task.train_items[int(batch_items[0]["prompt"])]
        return [task.judge(item, list(joint), 0).reward for joint in zip(*answers)]

    def transition(prompt, agent_completions, response_history_per_agent, **_):
        item, responses = task.train_items[int(prompt)], list(agent_completions)
        feedback = task.judge(item, responses, len(response_history_per_agent[0]) - 1).feedback
        return [prompt_of(item, agent, responses[agent], feedback[agent]) for agent in range(AGENTS)]

    trainer = getattr(trainers, TRAINERS[algorithm] + "Trainer")(
        agent_model=job["model"], tokenizer=tokenizer, model_config={"dtype": "bfloat16" if gpu else "float32"},
        reward_func=reward, external_transition=transition,
        formatters=[lambda item, agent=agent: prompt_of(task.train_items[int(item["prompt"])], agent)
                    for agent in range(AGENTS)],
        args=getattr(trainers, TRAINERS[algorithm] + "Config")(
            num_agents=AGENTS, num_turns=turns, agent_learning_rate=5e-6, temperature=1.0, top_p=1.0, top_k=0,
            discount=0.9, num_train_epochs=1, eval_interval=0, external_prompt_passthrough=True,
            num_generations=group, max_new_tokens=job["tokens"], early_termination_threshold=None,
            **({"critic_learning_rate": 5e-6} if critic else {})),
        **({"critic_model": job["model"]} if critic else {"num_agents": AGENTS}))

    def train(items):
        trainer.train_dataset = [{"prompt": str(item)} for item in items]
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    episodes, joint_actions = group, group * turns  # of an item
    if not critic:  # a tree: its leaves and its nodes
        episodes, joint_actions = group ** turns, sum(group ** t for t in range(1, turns + 1))
    # over several turns cc and dc are slow; on a GPU, where an answer takes seconds, one update must do
    items = max(1, 8 // joint_actions) if gpu else EPISODES // (4 if critic and turns > 1 else episodes)
    train(range(2))
    seconds = train(range(2, 2 + items))
    return {"seconds": seconds, "episodes": items * episodes, "joint actions": items * joint_actions}

# --- runs and table ---------------------------------------------------------------------------------------------------


def run_job(function, **job):
    """Call one of the functions above in a process of its own (ours: in job["ranks"]); returns what it returns."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false",
                                "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    if job["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        job |= {"out": os.path.join(folder, "run"), "result": os.path.join(folder, "result.json")}
        start = ["-m", "torch.distributed.run", f"--nproc_per_node={job['ranks']}"] if job["ranks"] > 1 else []
        run = subprocess.run([sys.executable, *start, __file__, "--job", function, json.dumps(job)], env=environment,
                             capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"error: {function} failed.\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
        return json.loads(Path(job["result"]).read_text())


def compare(args, folder):
    """Run every side of every setting in turn, --repeat times; print the table."""
    size = SMALL if args.small else LARGE if args.model else NORMAL
    if not args.model:
        build_model(folder, size["width"], size["layers"])
    sides = [(code, ranks) for code in args.only if code != "also" or args.also
             for ranks in (args.ranks if code != "peer" else [1])]
    runs, repeats = {}, range(1 if args.small else args.repeat)  # runs of each row of the table
    for _, algorithm, turns, (code, ranks) in product(repeats, args.algorithms, args.turns, sides):
        run = run_job("peer" if code == "peer" else "ours", algorithm=algorithm, turns=turns, ranks=ranks,
                      answers=4 if turns == 1 else 2 if algorithm == "mc" else 1,  # to a prompt
                      folder=os.path.abspath(args.also if code == "also" else ROOT), model=args.model or folder,
                      device="cuda" if args.model else "cpu", threads=args.threads, **size)
        key = (algorithm, turns, code + (", torchrun" if ranks > 1 else ""))
        runs.setdefault(key, []).append(run)
        print(*key, {name: round(number, 2) for name, number in run.items()}, file=sys.stderr)

    print("Rates a second; times: of the peer's rate; milliseconds of a joint action.\n\n"
          "|  | turns | code | episodes/s | times | joint actions/s | times | rollout ms | update ms |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for key in runs:
        cells, rival = list(key), (*key[:2], "peer")
        for unit in ("episodes", "joint actions"):
            rate = {side: median(run[unit] / run["seconds"] for run in runs[side]) for side in runs}
            cells += [f"{rate[key]:.2f}", f"{rate[key] / rate[rival]:.2f}" if rival in rate else ""]
        for part in ("rollout", "update"):  # the log of a train script has them
            cells.append("" if key[2] == "peer" else
                         f"{median(1e3 * run[part] / run['joint actions'] for run in runs[key]):.1f}")
        print("|", " | ".join(map(str, cells)), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", metavar="FOLDER", help="another checkout of this repository to run as well")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES, help="these sides alone")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="processes of ours (default 1 2)")
    parser.add_argument("--algorithms", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="default all")
    parser.add_argument("--turns", nargs="+", type=int, default=[1, 4], help="default 1 4")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; medians are shown (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, on idle cores (default 2)")
    parser.add_argument("--model", help="on a GPU: a folder (results/scaling.py --build) instead of the small Llama")
    parser.add_argument("--small", action="store_true", help="a toy of everything, once, to see whether it works")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job[1])
        sys.path.insert(0, job["folder"])
        result = json.dumps(globals()[args.job[0]](job))
        if os.environ.get("RANK", "0") == "0":
            Path(job["result"]).write_text(result)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, folder)


if __name__ == "__main__":
    main()
