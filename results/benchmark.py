"""
How fast is it? Ours against the official code, comlrl 1.4.3, and against the bare forward and backward of its model.

 1. Speed. Both train one randomly initialised Llama (width 128, 4 layers, float32) on one made-up task: each of two
    agents reads about 200 tokens and writes exactly 96, sampled from the whole vocabulary but the special tokens.
    Every run is a process of its own, ours and the peer's in turn; what comes before the first update is left out.
    Ours is the train script itself: 32 episodes a step, rank 16, with its defaults or with the peer's passes, groups
    and updates, in one process or (torchrun) in two that share the threads. The peer trains whole models, one pass of
    8 answers an update (cc, dc) or of all answers to 2 prompts (mc), its defaults; over several turns it allows one
    answer per prompt (cc, dc) or a tree (mc: 2 branches a node, as in its Minecraft runs), whose leaves count as
    episodes; as the peer, ours plays the tree, too.
 2. Floor. The calls of the model in our last step, repeated on the bare model: prefill of the prompts, decode with a KV
    cache, forward and backward of every micro-batch; no adapters, no sampling, no bookkeeping.
 3. --to_score 60: seconds of training, evaluations left out, until strbuild's held-out score is 60, from one tiny
    base. Ours with its defaults or --our_settings; the peer updates once per 16 episodes, as ours does, unless
    --peer_buffer says otherwise.

    pip install comlrl==1.4.3                          # the peer; nothing else in this repository needs it
    python results/benchmark.py                        # 1 and 2
    python results/benchmark.py --small                # three minutes: does it work?
    python results/benchmark.py --model FOLDER         # 1 on a GPU, with a real LLM's shape in bf16
    python results/benchmark.py --to_score 60
"""
import argparse
import functools
import importlib.util
import itertools
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
AGENTS, SPECIAL = 2, ["<pad>", "<end>", "<unk>", "<user>", "<assistant>"]
TRAINERS = {"cc": "MAAC", "dc": "IAC", "mc": "MAGRPO"}
PARTS = ("rollout", "scoring", "critic", "update")
NORMAL = {"episodes": 32, "words": 198, "tokens": 96, "steps": 2, "width": 128, "layers": 4}
LARGE = {"episodes": 32, "words": 40, "tokens": 96, "steps": 2}  # on a GPU
SMALL = {"episodes": 32, "words": 20, "tokens": 8, "steps": 1, "width": 32, "layers": 2}
# answers: to each prompt, over a single turn
AS_PEER = {"answers": 4, "passes": 1}
SIDES = {"peer": {"answers": 4}, "ours, as the peer": AS_PEER, "ours, as the peer, torchrun": AS_PEER | {"ranks": 2},
         "peer, 16": {"answers": 16}, "ours, as the peer, 16, torchrun": AS_PEER | {"answers": 16, "ranks": 2},
         "ours": {}}

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


def timed(seconds, name, function):
    """The function, wrapped so that its run time is added to seconds[name]."""
    @functools.wraps(function)  # the peer inspects signatures
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result
    return wrapper

# --- ours: the train script, instrumented -----------------------------------------------------------------------------


def rollout_counts(job):
    """In the peer's kind of rollout: answers to a prompt, and an item's episodes and joint actions."""
    T, tree = job["turns"], job["algorithm"] == "mc"
    G = job["answers"] if T == 1 else 2 if tree else 1
    return (G, G ** T, sum(G ** t for t in range(1, T + 1))) if tree else (G, G, G * T)


def train_script(algorithm, **flags):
    script = str(ROOT / f"train_{algorithm}.py")
    sys.argv = [script, *(str(word) for name, value in flags.items()
                          for word in ([f"--{name}"] if value is True else [f"--{name}", value]))]
    runpy.run_path(script, run_name="__main__")


def ours(job):
    import tasks
    from critic import Critic
    from model import LanguageModel, memory_gb
    steps, seconds = [], {}  # steps: of each, its calls (part, time, rows, T, new tokens; rollout: answers)
    tasks.TASKS["bench"] = bench = bench_task(job["words"])
    bench.judge_all = timed(seconds, "scoring", bench.judge_all)

    def watch(owner, name, describe):
        method = getattr(owner, name)

        def watched(self, *args, **kwargs):
            part, *shape = describe(*args, **kwargs)
            if part == "rollout" and (not steps or steps[-1][-1][0] != "rollout"):
                steps.append([])
            steps[-1].append((part, time.perf_counter(), *shape))
            return method(self, *args, **kwargs)
        setattr(owner, name, watched)

    def longest(texts):
        return max(map(len, texts))

    watch(LanguageModel, "generate", lambda names, prompts, uniforms, *_: (
        "rollout", len(set(zip(names, map(tuple, prompts)))), longest(prompts), uniforms.shape[1], len(names)))
    watch(LanguageModel, "logprobs", lambda names, prompts, tokens, *_: (
        "update", len(names), longest(prompts) + longest(tokens) - 1, longest(tokens)))
    watch(Critic, "forward", lambda inputs, turns: ("critic", len(inputs), longest(inputs), 0))
    more = {"passes": job["passes"]} if "passes" in job else {}
    if "answers" in job:
        group, leaves, answers = rollout_counts(job)
        more |= {"group_size": group} | ({"tree": True} if job["algorithm"] == "mc" else {})
        more["minibatches"] = job["episodes"] * answers // leaves // (2 * group if job["algorithm"] == "mc" else 8)
    ranks = job.get("ranks", 1)
    train_script(job["algorithm"], task="bench", model=job["model"], batch_size=job["episodes"] // ranks,
                 num_turns=job["turns"], max_new_tokens=job["tokens"], steps=job["steps"] + 1,
                 threads=max(1, job["threads"] // ranks), save_every=1000, device=job["device"], out_dir=job["out"],
                 **more)
    with open(os.path.join(job["out"], "log.jsonl")) as file:
        before, *lines = [line for line in map(json.loads, file) if "time/rollout_s" in line]
    steps = [step for step in steps if any(part == "update" for part, *_ in step)]  # the others are evaluations
    steps = steps[-job["steps"] - 1:]  # without the first calls, with which the model is tried out
    rollout, update = (mean(line[f"time/{part}_s"] for line in lines) for part in ("rollout", "update"))
    scoring = seconds["scoring"] / len(steps)
    critic = mean(next(call[1] for call in step if call[0] == "update") -
                  next(call[1] for call in step if call[0] in ("critic", "update")) for step in steps[1:])
    return {"rollout": rollout - scoring, "scoring": scoring, "critic": critic, "update": update - critic,
            "seconds": rollout + update, "episodes": job["episodes"],
            "answers": (lines[-1]["joint_actions"] - before["joint_actions"]) // len(lines),
            "memory": ranks * memory_gb(job["device"])} | (
                {"floor": floor(job["model"], steps[-1])} if job["floor"] else {})


def floor(folder, calls):
    """Seconds that the bare model needs for these calls, by part; "frozen PART": without gradients for its weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import Cache, DynamicLayer
    model, seconds = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), {}

    class RoomyLayer(DynamicLayer):
        """Has room to grow; the library's own layer copies all earlier keys and values for each new token."""

        def update(self, keys, values, *args, **kwargs):
            old = self.get_seq_length()
            new = old + keys.shape[2]
            if not old:
                self.lazy_initialization(keys, values)
                self.keys, self.values, self.room = keys[:, :, :0], values[:, :, :0], None
            if self.room is None or len(self.room[0]) != len(keys) or self.room[0].shape[2] < new:
                self.room = [torch.nn.functional.pad(x, (0, 0, 0, new + 64 - old)) for x in (self.keys, self.values)]
            for x, room in zip((keys, values), self.room):
                room[:, :, old:new] = x
            self.keys, self.values = (room[:, :, :new] for room in self.room)
            return self.keys, self.values

    def draw(*shape):
        return torch.randint(len(SPECIAL), 1000, shape)

    @torch.inference_mode()
    def rollout(rows, T, new, answers):
        cache = Cache(layer_class_to_replicate=RoomyLayer)
        model(input_ids=draw(rows, T), past_key_values=cache, logits_to_keep=1)
        cache.batch_select_indices(torch.arange(answers) % rows)
        for _ in range(new - 1):
            model(input_ids=draw(answers, 1), past_key_values=cache, logits_to_keep=1)

    def learn(rows, T, new):
        ids = draw(rows, T)
        embedded = model.get_input_embeddings()(ids).requires_grad_()  # (rows, T, C)
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        loss = hidden[:, -1].sum()
        if new:
            logp = model.get_output_embeddings()(hidden[:, -new:]).log_softmax(-1)  # (rows, new, V)
            loss = logp.gather(2, ids[:, -new:, None]).sum()
        loss.backward()

    for prefix in ("warm-up ", "", "frozen "):
        model.requires_grad_(prefix != "frozen ")
        for part, _, *shape in calls[-1:] if prefix == "warm-up " else calls:
            timed(seconds, prefix + part, rollout if part == "rollout" else learn)(*shape)
    return seconds

# --- the peer ---------------------------------------------------------------------------------------------------------


def peer_trainer(task, folder, algorithm, seconds, lr, dtype="float32", **settings):
    """The peer's trainer on a task of ours: our prompts, our judge as its reward and its feedback between turns."""
    from comlrl import trainers
    from transformers import AutoTokenizer
    from tasks import Episode, Turn, history
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompts(item, turns=()):
        return [tokenizer.apply_chat_template(history(task, Episode(item, list(turns)), agent), tokenize=False,
                                              add_generation_prompt=True) for agent in range(AGENTS)]

    def reward(*answers, batch_items):  # answers: one list per agent; an item is known by its number
        item = task.train_items[int(batch_items[0]["prompt"])]
        return [task.judge(item, list(joint), 0).reward for joint in zip(*answers)]

    def transition(prompt, agent_completions, response_history_per_agent, **_):
        item, responses = task.train_items[int(prompt)], list(agent_completions)
        outcome = task.judge(item, responses, len(response_history_per_agent[0]) - 1)
        return prompts(item, [Turn(None, None, None, responses, outcome)])

    critic = algorithm != "mc"
    return prompts, tokenizer, getattr(trainers, TRAINERS[algorithm] + "Trainer")(
        agent_model=folder, tokenizer=tokenizer, model_config={"dtype": dtype},
        reward_func=timed(seconds, "scoring", reward), external_transition=transition,
        formatters=[lambda item, agent=agent: prompts(task.train_items[int(item["prompt"])])[agent]
                    for agent in range(AGENTS)],
        args=getattr(trainers, TRAINERS[algorithm] + "Config")(
            num_agents=AGENTS, num_turns=task.num_turns, agent_learning_rate=lr, temperature=1.0, top_p=1.0, top_k=0,
            discount=0.9, num_train_epochs=1, eval_interval=0, external_prompt_passthrough=True,
            **({"critic_learning_rate": lr} if critic else {}), **settings),
        **({"critic_model": folder} if critic else {"num_agents": AGENTS}))


def train(trainer, items):
    trainer.train_dataset = [{"prompt": str(item)} for item in items]
    trainer.train()


def peer(job):
    import torch
    from model import memory_gb
    torch.set_num_threads(job["threads"])
    T, seconds, (G, leaves, answers) = job["turns"], {}, rollout_counts(job)
    _, _, trainer = peer_trainer(bench_task(job["words"])(AGENTS, T), job["model"], job["algorithm"], seconds, 5e-6,
                                 "bfloat16" if job["device"] == "cuda" else "float32", num_generations=G,
                                 max_new_tokens=job["tokens"], early_termination_threshold=None)
    critics, backward, losses = getattr(trainer, "critics", []), torch.Tensor.backward, []
    for agent in trainer.agents:
        agent.generate = timed(seconds, "rollout", agent.generate)
    for critic in critics:
        critic.forward = timed(seconds, "critic", critic.forward)

    def watched_backward(loss):
        losses.append(1)  # by turns an agent's loss and a critic's
        timed(seconds, "critic" if critics and len(losses) % 2 == 0 else "actor", backward)(loss)

    torch.Tensor.backward = watched_backward
    train(trainer, range(1 if job["device"] == "cuda" else 2))
    seconds.update(dict.fromkeys(seconds, 0.0))
    if job["device"] == "cuda":  # an answer takes seconds: a single update
        items = max(1, 8 // answers)
    else:  # over several turns cc and dc are slow
        items = max(2, job["episodes"] // (leaves if T == 1 or job["algorithm"] == "mc" else 4 * G))
    timed(seconds, "all", train)(trainer, range(2, 2 + items))
    parts = {part: seconds.get(part, 0.0) for part in PARTS[:3]}
    return parts | {"update": seconds["all"] - sum(parts.values()), "seconds": seconds["all"],
                    "memory": memory_gb(job["device"]), "episodes": items * leaves, "answers": items * answers}

# --- training to a score ----------------------------------------------------------------------------------------------


def ours_to_score(job):
    """train_cc.py with its defaults or job["settings"]; its wall_s counts training only."""
    import tasks
    summary, reached = tasks.summary, []

    def watched(episodes, prefix, *args):
        if reached:  # that evaluation has been logged
            sys.exit()
        numbers = summary(episodes, prefix, *args)
        reached.extend([1] * (numbers.get("eval/score", 0) >= job["score"]))
        return numbers

    tasks.summary = watched
    try:
        train_script("cc", model=job["model"], seed=job["seed"], threads=job["threads"], device="cpu", eval_every=1,
                     out_dir=job["out"], **job["settings"])
    except SystemExit:
        pass
    with open(os.path.join(job["out"], "log.jsonl")) as file:
        lines = [line for line in map(json.loads, file) if "eval/score" in line]
    return [(line["wall_s"], line["episodes"], line["eval/score"]) for line in lines]


def peer_to_score(job):
    import torch
    from tasks import Episode, Turn, get_task
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    random.seed(job["seed"])
    task, rng, seconds, evals = get_task("strbuild"), random.Random(job["seed"]), {"training": 0.0}, []
    items = job["buffer"] // task.num_turns  # one update between evaluations, as ours
    prompts, tokenizer, trainer = peer_trainer(
        task, job["model"], "cc", seconds, job["lr"], num_generations=1, max_new_tokens=task.max_new_tokens,
        early_termination_threshold=-0.1, rollout_buffer_size=job["buffer"])

    def held_out():
        episodes = [Episode(item) for item in task.eval_items]
        for t in range(task.num_turns):
            running, answers = [e for e in episodes if not (e.turns and e.turns[-1].outcome.done)], []
            texts = [prompts(e.item, e.turns) for e in running]
            for k, agent in enumerate(trainer.agents if running else []):
                batch = tokenizer([text[k] for text in texts], return_tensors="pt", padding=True, padding_side="left")
                tokens = agent.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=True,
                                        temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=task.max_new_tokens)
                answers.append(tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1]:], skip_special_tokens=True))
            for e, joint in zip(running, zip(*answers)):
                e.turns.append(Turn(None, None, None, joint, task.judge(e.item, list(joint), t)))
        return mean(e.turns[-1].outcome.score for e in episodes)

    while True:
        with torch.random.fork_rng():  # the same draws in every evaluation, as ours
            torch.manual_seed(1234)
            evals.append((seconds["training"], len(evals) * items, held_out()))
        if evals[-1][2] >= job["score"] or evals[-1][0] >= job["cap"]:
            return evals
        timed(seconds, "training", train)(trainer, rng.choices(range(len(task.train_items)), k=items))

# --- runs and tables --------------------------------------------------------------------------------------------------


def run_job(function, **job):
    """Call one of the functions above in a process of its own; returns what it returns."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
                                "TOKENIZERS_PARALLELISM": "false"}
    if job.get("device") != "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        job |= {"out": os.path.join(folder, "run"), "result": os.path.join(folder, "result.json")}
        start = ["-m", "torch.distributed.run", f"--nproc_per_node={job['ranks']}"] if "ranks" in job else []
        run = subprocess.run([sys.executable, *start, __file__, "--job", function, json.dumps(job)], env=environment,
                             capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"error: {function} failed.\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
        with open(job["result"]) as file:
            return json.load(file)


def table(*rows):
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def speed(args, folder):
    size, results = SMALL if args.small else LARGE if args.model else NORMAL, {}
    device = "cuda" if args.model else "cpu"
    if not args.model:
        build_model(folder, size["width"], size["layers"])
    for repeat in range(args.repeat):
        for algorithm, turns, side in itertools.product(args.algorithms, args.turns, SIDES):
            if side[:4] not in args.only or "16" in side and (turns > 1 or args.small) or args.model and (
                    side not in ("peer", "ours, as the peer")):
                continue
            result = run_job(side[:4], algorithm=algorithm, turns=turns, model=args.model or folder, device=device,
                             floor=repeat == 0 and "ranks" not in SIDES[side] and not args.model,
                             threads=args.threads, **size, **SIDES[side])
            results.setdefault((algorithm, turns, side), []).append(result)
            print(f"{algorithm}, {turns} turns, {side}: {result['episodes'] / result['seconds']:.2f} episodes/s",
                  file=sys.stderr)

    def rate(key, unit="episodes"):
        return median(run[unit] / run["seconds"] for run in results[key])

    rows, floors = [], []
    for key, runs in results.items():
        rival = (*key[:2], "peer, 16" if "16" in key[2] else "peer")
        spent = [median(size["episodes"] * run[part] / run["episodes"] for run in runs) for part in PARTS]
        rows.append([*key, f"{rate(key):.2f}", f"{rate(key, 'answers') * AGENTS * size['tokens']:.0f}", *(
            f"{part:.2f}" for part in spent), f"{median(run['memory'] for run in runs):.2f}",
            f"{rate(key) / rate(rival):.2f}" if rival in results and "as" in key[2] else ""])
        if "floor" in runs[0]:
            bare = {part: runs[0]["floor"].get(part, 0.0)
                    for part in (*PARTS, *(f"frozen {part}" for part in PARTS))}
            floors.append([*key, *(f"{mine:.2f} / {bare[part]:.2f}" for part, mine in zip(PARTS, spent)), *(
                f"{sum(spent) / sum(bare[prefix + part] for part in PARTS):.2f}" for prefix in ("", "frozen "))])
    print(f"Seconds for {size['episodes']} episodes; last column: ours / the peer, in episodes.\n")
    table(["", "turns", "code", "episodes/s", "tokens/s", *(f"{part} s" for part in PARTS), "GiB", "times"], *rows)
    if floors:
        print("Seconds of a step: ours / bare model; factors: in all, and with the bare model's weights frozen.\n")
        table(["", "turns", "code", *PARTS, "factor", "frozen"], *floors)


def to_score(args):
    from model import model_folders
    from tasks import get_task
    shared = {"model": model_folders("tiny", get_task("strbuild"))[0], "threads": args.threads, "seed": args.seed,
              "score": args.to_score, "cap": args.cap_s}
    runs = {f"peer, rate {lr}": ("peer_to_score", {"lr": float(lr), "buffer": args.peer_buffer})
            for lr in args.peer_lr.split(",")} | {
                f"ours {args.our_settings}".strip(): ("ours_to_score", {"settings": dict(
                    setting.split("=") for setting in args.our_settings.split())})}
    rows = []
    for name, (function, more) in runs.items():
        if name[:4] in args.only:
            evals = run_job(function, **shared, **more)
            best = max(score for _, _, score in evals)
            reached = [line for line in evals if line[2] >= args.to_score and line[0] <= args.cap_s]
            seconds, episodes, _ = (reached or evals[-1:])[0]
            rows.append([name, f"{seconds:.1f}" if reached else f"not within {args.cap_s:g}", episodes, f"{best:.1f}",
                         f"{evals[0][2]:.1f}"])
            print(rows[-1], file=sys.stderr)
    table(["", f"seconds to score {args.to_score:g}", "episodes", "best score", "untrained"], *rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ours", "peer"], default="ours peer", help="one side alone")
    parser.add_argument("--algorithms", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="default all")
    parser.add_argument("--turns", nargs="+", type=int, default=[1, 4], help="default 1 4")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; medians are shown (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--model", help="on a GPU: a folder (results/scaling.py --build) instead of the small Llama")
    parser.add_argument("--small", action="store_true", help="a toy of everything, once, to see whether it works")
    parser.add_argument("--to_score", type=float, help="train to this held-out score of strbuild instead")
    parser.add_argument("--cap_s", type=float, default=1200, help="longest training in seconds (default 1200)")
    parser.add_argument("--peer_lr", default="1e-4,3e-4,1e-3", help="learning rates that the peer tries")
    parser.add_argument("--peer_buffer", type=int, default=64, help="answers per agent and update (16 episodes)")
    parser.add_argument("--our_settings", default="", help='"lr=4e-3 batch_size=8 ...": instead of our defaults')
    parser.add_argument("--seed", type=int, default=0, help="of training to a score")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(setting.count("=") != 1 for setting in args.our_settings.split()):
        parser.error(f"--our_settings must be NAME=VALUE with spaces between, not {args.our_settings!r}.")
    if args.model and not os.path.isfile(os.path.join(args.model, "config.json")):
        parser.error(f"{args.model} is not a model folder: it has no config.json.")
    if args.peer_buffer < 4:
        parser.error("--peer_buffer must be 4 or more: an episode has four answers of an agent.")
    if args.job:
        job = json.loads(args.job[1])
        result = json.dumps(globals()[args.job[0]](job))
        if os.environ.get("RANK", "0") == "0":
            with open(job["result"], "w") as file:
                file.write(result)
        return
    if "peer" in args.only and importlib.util.find_spec("comlrl") is None:
        sys.exit("error: the peer is missing: pip install comlrl==1.4.3 (or --only ours)")
    args.repeat = 1 if args.small else args.repeat
    with tempfile.TemporaryDirectory() as folder:
        to_score(args) if args.to_score else speed(args, folder)


if __name__ == "__main__":
    main()
