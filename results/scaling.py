"""
What a step costs: arithmetic and memory as formulas, checked by measurements on small models, then used for large ones.

    python results/scaling.py --measure    # one quantity at a time is doubled: measured against predicted, in minutes
    python results/scaling.py              # memory and arithmetic of real LLMs' shapes; nothing of that size is built
    python results/scaling.py --build Qwen3-4B FOLDER                 # a model of such a shape, random weights
    python results/scaling.py --speed FOLDER --compile                # a sampled token and updates, on a GPU if any

N is the number of weights that each token passes (all matrices but the embedding and the output layer), H those of the
output layer, p the tokens of a prompt, L those of an answer, h those of the history that a critic reads (p and h count
a beginning that turns or a group's answers share once); there are n agents, T turns, B episodes, K critics.
A product of matrices costs 2 operations per weight and token; adapters and attention scores are left out (they are a
few percent as long as p + L is small against the model's width x layers).

    rollout   n T B [2 N (p + L) + 2 H L]          each answer token passes the model once
    actors    n T B passes [4 N (p + L) + 4 H L]   forward, and backward to activations: the weights are frozen
    critics   K T B passes 4 N h                   as the actors, V(h_t) included; no output layer
    with --gradient_checkpointing every update also computes its forward a second time: 6 N instead of 4 N
    a full fine-tuning would need gradients of weights as well: again 6 N instead of 4 N

Memory of one GPU: the frozen base (2 bytes a weight in bf16), n + K adapters with AdamW (16 bytes a weight in fp32:
weight, gradient, two moments), and the larger one of
    rollout   the KV cache: n B (p + L) x layers x 2 x KV heads x head width x 2 bytes, and as much per token of the
              first turn's prompts, which are kept for the later turns
    update    micro_batch rows: (p + L) x what a layer keeps for the backward pass x layers, or with checkpointing
              (p + L) x (layers x 2 C bytes + what one layer keeps); and 18 V bytes per answer token for the logits.
What a layer keeps is not guessed: a real layer of that width is built and what autograd saves is counted.
"""
import argparse
import functools
import gc
import json
import os
import random
import runpy
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import torch

GIB = 2 ** 30
SHAPES = {  # Qwen3's published configurations: width, layers, heads, KV heads, head width, MLP width, vocabulary, tied
    "Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True), "Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen3-4B": (2560, 36, 32, 8, 128, 9728, 151936, True), "Qwen3-8B": (4096, 36, 32, 8, 128, 12288, 151936, False)}


def config_of(shape, layers=None, vocabulary=None):
    from transformers import Qwen3Config
    width, depth, heads, kv_heads, head, mlp, vocab, tied = shape
    return Qwen3Config(hidden_size=width, num_hidden_layers=layers or depth, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, head_dim=head, intermediate_size=mlp,
                       vocab_size=vocabulary or vocab, tie_word_embeddings=tied, max_position_embeddings=8192)


def build(name, folder):
    """A model folder of a real LLM's shape with random bf16 weights, to measure speed and memory without a download.

    Its tokenizer splits strbuild's prompts into words and single digits, as Qwen's does; the rest of the vocabulary is
    all words of up to three letters, so that a random answer of 512 tokens has about 512 tokens in the next prompt.
    """
    import itertools
    import string
    from transformers import AutoModelForCausalLM
    from model import bpe_tokenizer, train_bpe
    from tasks import Episode, get_task, history
    task = get_task("strbuild")
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    conversations = [history(task, Episode(task.eval_items[0]), agent) for agent in range(2)]
    conversations += [task.demonstration(random.Random(item)) for item in range(50)]
    ranks = train_bpe([message["content"] for messages in conversations for message in messages], pattern)
    for n in (1, 2, 3):
        for letters in itertools.product(string.ascii_letters, repeat=n):
            ranks.setdefault((" " + "".join(letters)).encode(), len(ranks))
    bpe_tokenizer(
        ranks, pattern, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pad_token="<|endoftext|>",
        eos_token="<|im_end|>", chat_template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config_of(SHAPES[name]), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def weights(shape, rank=16):
    """(N, weights of the output layer, weights in memory, weights of one adapter of that rank on all matrices)."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    matrices = [p.shape for key, p in model.named_parameters()
                if p.ndim == 2 and "embed" not in key and "lm_head" not in key]
    return (sum(a * b for a, b in matrices), shape[0] * shape[6], sum(p.numel() for p in model.parameters()),
            sum(rank * (a + b) for a, b in matrices))


def kept_by_a_layer(shape, tokens=127):
    """Bytes per token that autograd keeps for one layer with a LoRA adapter, in bf16 with fp32 adapters as on a GPU.

    There RMSNorm is one kernel. A CPU has none, so layer norm takes its place: it keeps the same, and a mean.
    """
    from transformers import AutoModelForCausalLM
    from model import LanguageModel
    kept = []
    for layers in (1, 2):  # the difference is one layer; everything outside of layers cancels
        lm = LanguageModel.__new__(LanguageModel)
        lm.causal_lm = AutoModelForCausalLM.from_config(config_of(shape, layers, 64), dtype=torch.bfloat16)
        lm.causal_lm.requires_grad_(False)
        for norm in lm.causal_lm.modules():
            if hasattr(norm, "variance_epsilon"):
                norm.forward = functools.partial(torch.nn.functional.layer_norm, normalized_shape=norm.weight.shape,
                                                 weight=norm.weight)
        lm.peft, lm.rank, lm.siblings, lm.device, lm.end = None, 16, [], "cpu", 0
        lm.can_merge, lm.target_modules = False, "all-linear"
        lm.add_adapter("agent_0")
        lm.set_rows(["agent_0"])
        saved = {}

        def save(x):
            if tokens in x.shape:  # weights are not kept for each token
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage()  # a storage saved twice counts once
            return x

        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            lm.causal_lm.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        kept.append(sum(storage.nbytes() for storage in saved.values()) / tokens)
        del lm, saved
        gc.collect()
    return kept[1] - kept[0]


def memory(shape, agents=2, critics=1, episodes=8, prompt=900, answer=512, micro_batch=2, rank=16):
    """GiB by part, without and with --gradient_checkpointing; prompt: the longest, with the last answer in it."""
    N, H, total, adapter = weights(shape, rank)
    width, layers, _, kv_heads, head, _, vocabulary, _ = shape
    layer, T = kept_by_a_layer(shape), prompt + answer
    static = {"base": 2 * total, "adapters": 16 * adapter * (agents + critics)}
    rows = agents * episodes
    cache = rows * (T + prompt - answer) * layers * 2 * kv_heads * head * 2 + 16 * rows * vocabulary
    logits = 18 * micro_batch * answer * vocabulary
    plain = micro_batch * T * layer * layers + logits
    checkpointed = micro_batch * T * (layers * 2 * width + layer) + logits
    part = {name: size / GIB for name, size in (static | {
        "cache": cache, "update": plain, "checkpointed": checkpointed}).items()}
    part["MiB a token"] = layer * layers / 2 ** 20
    for name in ("update", "checkpointed"):
        part[f"peak, {name}"] = part["base"] + part["adapters"] + max(part["cache"], part[name])
    return part


def operations(episodes, shape_weights, passes):
    """Operations of one step on these episodes, by part: the formulas above with the real lengths of every row."""
    N, H = shape_weights
    new = sum(len(a) for e in episodes for turn in e.turns for a in turn.tokens)
    prompts = sum(distinct(own) for e in episodes for own in zip(*(turn.prompts for turn in e.turns)))
    learned = sum(distinct([p + a for p, a in zip(prompts, answers)]) for e in episodes for prompts, answers in zip(
        zip(*(turn.prompts for turn in e.turns)), zip(*(turn.tokens for turn in e.turns))))  # per episode and agent
    read = sum(distinct(inputs) for e in episodes for inputs in zip(*(turn.critic_inputs for turn in e.turns)))
    return {"rollout": 2 * N * (prompts + new) + 2 * H * new,
            "update": passes * (4 * N * (learned + read) + 4 * H * new)}


def distinct(sequences):
    """Tokens to compute when shared prefixes are computed once: [1, 2, 3] and [1, 2, 4] have 4."""
    rows = sorted(sequences)
    return sum(len(row) - len(os.path.commonprefix([before, row])) for before, row in zip([[], *rows], rows))


def measure(arguments):
    """Train three steps in this process; print operations and seconds of the last one, by part, as JSON."""
    import benchmark
    import tasks
    agents, turns, batch, words, answer, width, layers = map(int, arguments.split(","))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        benchmark.build_model(os.path.join(folder, "model"), width, layers)
        benchmark.AGENTS = agents
        bench = benchmark.bench_task(words)
        bench.agents = (1, 2, 3, 4)
        tasks.TASKS["bench"] = bench
        sys.argv = ["train_cc.py", "--model", os.path.join(folder, "model"), "--out_dir", os.path.join(folder, "run"), *(
            f"--task bench --num_agents {agents} --num_turns {turns} --batch_size {batch} --max_new_tokens {answer} "
            "--steps 3 --save_every 99 --device cpu --threads 1").split()]
        run = runpy.run_path(str(ROOT / "train_cc.py"), run_name="__main__")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    matrices = [p for key, p in run["lms"][0].causal_lm.named_parameters()
                if p.ndim == 2 and "lora_" not in key and "embed" not in key and "lm_head" not in key]
    work = operations(run["episodes"], (sum(p.numel() for p in matrices), width * 1005), run["args"].passes)
    line = [line for line in lines if "train/reward" in line][-1]
    print("MEASURED", json.dumps({"operations": work, "seconds": {name: line[f"time/{name}_s"] for name in work}}))


def speed(folder, compiled, prompt=900, answer=512, rows=16):
    """Print the milliseconds of a sampled token of two agents, how many of them mere reading would take, and of updates."""
    from model import LanguageModel, memory_gb
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, draw = LanguageModel(folder, device, compiled=compiled), random.Random(0)
    parameters = [p for name in ("agent_0", "agent_1") for p in lm.add_adapter(name)]
    lm.end = -1  # answers must not end early
    if prompt + 16 + answer > lm.context:
        sys.exit(f"{folder} reads {lm.context} tokens only; {prompt + 16 + answer} are needed.")
    output = lm.causal_lm.get_output_embeddings().weight

    def tokens(n):
        return [draw.randrange(len(output)) for _ in range(n)]

    def milliseconds(function, *arguments):
        for _ in range(2):  # the first time compiles and allocates
            start = time.perf_counter()
            function(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    names, prompts = [f"agent_{2 * row // rows}" for row in range(rows)], [tokens(prompt) for _ in range(rows)]
    short, long = (milliseconds(lm.generate, names, prompts, torch.rand(rows, new)) for new in (16, 16 + answer))
    big, other = torch.zeros(2, 2 ** 26, device=device)  # 256 MiB each
    bandwidth = 20 * big.nbytes / milliseconds(lambda: [big.copy_(other) for _ in range(10)])  # bytes per ms
    del big, other
    config = lm.causal_lm.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = rows * (prompt + 16 + answer / 2) * 2 * config.num_hidden_layers * kv_heads * head
    base = [p for key, p in lm.causal_lm.named_parameters() if "lora_" not in key]
    inner = sum(p.numel() for p in base if p.ndim == 2 and p.shape != output.shape)  # tied embeddings are looked up
    token = (long - short) / answer
    read = base[0].itemsize * (inner + output.numel() + cache)
    print(f"{folder} on {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}, which copies {bandwidth / 1e6:.0f} "
          f"GB/s\na token of {rows} rows behind {prompt} tokens: {token:.2f} ms; reading the {read / 1e9:.4g} GB of "
          f"weights, keys and values once would take {read / bandwidth / token:.0%} of that\nprompts and 16 tokens: {short:.0f} ms")
    for B in (1, 2, 4, 8):
        def update():
            logp, _ = lm.logprobs(["agent_0"] * B, prompts[:B], [tokens(answer)] * B)
            logp.sum().backward()
            for p in parameters:
                p.grad = None
        try:
            spent = milliseconds(update)
        except torch.OutOfMemoryError:
            return print(f"an update of {B} rows: out of memory")
        work = B * (4 * inner * (prompt + answer) + 4 * output.numel() * answer)
        print(f"an update of {B} rows with {answer} more: {spent:.0f} ms, {work / spent / 1e9:.3g} TFLOP/s, peak so far "
              f"{memory_gb(device):.1f} GiB", flush=True)


def main():
    parser = argparse.ArgumentParser(description="What a step costs, by formula and by measurement.")
    parser.add_argument("--measure", action="store_true", help="check the formulas on small models")
    parser.add_argument("--build", nargs=2, metavar=("SHAPE", "FOLDER"), help="write such a model with random weights")
    parser.add_argument("--speed", metavar="FOLDER", help="time a sampled token and updates of this model")
    parser.add_argument("--compile", action="store_true", help="with --speed: as the train scripts' --compile")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.speed:
        return speed(args.speed, args.compile)
    if args.build:
        if args.build[0] not in SHAPES or os.path.exists(args.build[1]):
            parser.error(f"choose a shape out of {', '.join(SHAPES)} and a folder that is not there yet.")
        return build(*args.build)
    if args.one:
        return measure(args.one)
    if args.measure:
        import subprocess
        base = {"agents": 2, "turns": 1, "episodes": 16, "prompt words": 100, "answer tokens": 64, "width": 256,
                "layers": 4}
        print("| doubled | operations | seconds | seconds per 10^9 operations: rollout, update | operations: x | "
              "seconds: x |\n|---|---|---|---|---|---|")
        first = None
        for name in [None, *base]:
            values = [value * (1 + (key == name)) for key, value in base.items()]
            out = subprocess.run([sys.executable, __file__, "--one", ",".join(map(str, values))],
                                 capture_output=True, text=True)
            if "MEASURED" not in out.stdout:
                sys.exit(out.stderr[-2000:])
            found = json.loads(out.stdout.split("MEASURED ")[1])
            work, spent = (sum(found[key].values()) for key in ("operations", "seconds"))
            first = first or (work, spent)
            rates = ", ".join(f"{1e9 * found['seconds'][part] / found['operations'][part]:.4f}"
                              for part in ("rollout", "update"))
            print(f"| {name or 'nothing'} | {work:.3g} | {spent:.2f} | {rates} | {work / first[0]:.2f} | "
                  f"{spent / first[1]:.2f} |", flush=True)
        return
    print("Memory in GiB: 2 agents and CoLLM-CC's critic, rank 16, 8 episodes, prompts of 900 tokens with the last "
          "answer in\nthem, 512 new tokens, --micro_batch 2; operations of a step of 4 turns, two passes, without "
          "checkpointing\n\n"
          "| model | base | adapters with AdamW | KV cache | kept for an update: MiB per token, in all | with "
          "checkpointing | peak | peak with checkpointing | 10^12 operations a step |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        part, (N, H, *_) = memory(shape), weights(shape)
        rows, p, L, h = 2 * 4 * 8, 900, 512, 1800
        work = rows * (2 * N * (p + L) + 2 * H * L) + rows * 2 * (4 * N * (p + L) + 4 * H * L) + 32 * 2 * 4 * N * h
        print(f"| {name} | {part['base']:.1f} | {part['adapters']:.1f} | {part['cache']:.1f} | "
              f"{part['MiB a token']:.1f}, {part['update']:.1f} | {part['checkpointed']:.1f} | "
              f"{part['peak, update']:.1f} | {part['peak, checkpointed']:.1f} | {work / 1e12:.0f} |", flush=True)


if __name__ == "__main__":
    main()
