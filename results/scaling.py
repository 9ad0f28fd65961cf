"""
What a real LLM's size costs: memory by formula, and the speed of a model of that shape on your machine.

    python results/scaling.py                              # memory of real LLMs' shapes; nothing of that size is built
    python results/scaling.py --build Qwen3-4B FOLDER      # a model of such a shape, random weights
    python results/scaling.py --speed FOLDER --compile     # a sampled token, and updates; on a GPU if there is one

Memory of one GPU for B episodes, prompts of p tokens and answers of L: the frozen base (2 bytes a weight in bf16), the
adapters of agents and critics with AdamW (16 bytes a weight: weight, gradient, two moments in fp32), and the larger of
    rollout   one agent's KV cache (they sample in turn): B (p + L) x layers x 2 x KV heads x head width x 2 bytes
    update    micro_batch rows: (p + L) x what a layer keeps for the backward pass x layers, or with checkpointing
              (p + L) x (layers x 2 C bytes + what one layer keeps); and 18 V bytes per answer token for the logits
What a layer keeps is counted on a real layer of that width. Most of it is fp32: PEFT casts an adapter's input to fp32,
for each matrix anew (q, k and v keep three copies of what they read), and transformers' norms compute in fp32.
"""
import argparse
import itertools
import random
import string
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from model import LanguageModel, bpe_tokenizer, memory_gb, train_bpe
from tasks import Episode, get_task, history

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # Qwen3's published configurations: width, layers, heads, KV heads, head width, MLP width, vocabulary, tied
    "Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True), "Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen3-4B": (2560, 36, 32, 8, 128, 9728, 151936, True), "Qwen3-8B": (4096, 36, 32, 8, 128, 12288, 151936, False)}


def random_model(shape, layers=None):
    """A bf16 model of this shape with random weights; layers: instead of the shape's number."""
    width, depth, heads, kv_heads, head, mlp, vocabulary, tied = shape
    return AutoModelForCausalLM.from_config(Qwen3Config(
        hidden_size=width, num_hidden_layers=layers or depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head, intermediate_size=mlp, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=8192), dtype=torch.bfloat16)


def build(name, folder):
    """A model folder; its tokenizer knows all words of up to 3 letters, so random answers are as long when read."""
    task = get_task("strbuild")
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    conversations = [history(task, Episode(task.eval_items[0]), agent) for agent in range(2)]
    conversations += [task.demonstration(random.Random(item)) for item in range(50)]
    ranks = train_bpe([message["content"] for messages in conversations for message in messages], pattern)
    for letters in itertools.chain(*(itertools.product(string.ascii_letters, repeat=n) for n in (1, 2, 3))):
        ranks.setdefault((" " + "".join(letters)).encode(), len(ranks))
    bpe_tokenizer(
        ranks, pattern, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pad_token="<|endoftext|>",
        eos_token="<|im_end|>", chat_template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        random_model(SHAPES[name]).save_pretrained(folder)


def kept_by_a_layer(shape, tokens=127):
    """Bytes per token that autograd keeps for one layer, in bf16 with an fp32 adapter, as on a GPU."""
    kept = []
    for layers in (1, 2):  # the difference is one layer; everything outside of layers cancels
        model, saved = random_model((*shape[:6], 64, True), layers), {}
        get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))  # it makes adapters fp32
        def save(x):
            if tokens in x.shape:  # weights are not kept for each token
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage()  # a storage saved twice counts once
            return x
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        kept.append(sum(storage.nbytes() for storage in saved.values()) / tokens)
    return kept[1] - kept[0]


def memory(shape, agents=2, critics=1, episodes=8, prompt=900, answer=512, micro_batch=2, rank=16):
    """GiB by part, without and with --gradient_checkpointing; prompt: the longest, with the last answer in it."""
    width, layers, _, kv_heads, head, _, vocabulary, _ = shape
    with torch.device("meta"):
        weights = dict(random_model(shape).named_parameters())
    adapter = sum(rank * sum(p.shape) for key, p in weights.items() if p.ndim == 2 and "layers" in key)
    layer, T, logits = kept_by_a_layer(shape), prompt + answer, 18 * micro_batch * answer * vocabulary
    part = {"base": 2 * sum(p.numel() for p in weights.values()), "adapters": 16 * adapter * (agents + critics),
            "KV cache": episodes * T * layers * 2 * kv_heads * head * 2,
            "kept": micro_batch * T * layer * layers + logits,
            "checkpointed": micro_batch * T * (layers * 2 * width + layer) + logits}
    for name in ("kept", "checkpointed"):
        part[f"peak, {name}"] = part["base"] + part["adapters"] + max(part["KV cache"], part[name])
    return {name: size / 2 ** 30 for name, size in part.items()}


def speed(folder, compiled, prompt=900, answer=512, rows=8):
    """Print the milliseconds of a sampled token of two agents, `rows` rows each, and of updates of 1, 2, 4, 8 rows."""
    lm = LanguageModel(folder, DEVICE, compiled=compiled)
    lm.add_adapter("agent_0"), lm.add_adapter("agent_1")
    lm.ends = {-1}  # no answer ends early
    output = lm.causal_lm.get_output_embeddings().weight
    prompts, answers = (torch.randint(len(output), (max(rows, 8), n)).tolist() for n in (prompt, answer))

    def milliseconds(function, *args):
        for _ in range(2):  # the first time compiles and allocates
            start = time.perf_counter()
            function(*args)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def sample(new):
        for name in ("agent_0", "agent_1"):
            lm.generate(name, prompts[:rows], torch.rand(rows, new))

    short, long = milliseconds(sample, 16), milliseconds(sample, 16 + answer)
    big, other = torch.zeros(2, 2 ** 26, device=DEVICE)  # 256 MiB each
    bandwidth = 20 * big.nbytes / milliseconds(lambda: [big.copy_(other) for _ in range(10)])  # bytes per ms
    layers = {key: p for key, p in lm.causal_lm.named_parameters() if "layers" in key and "lora_" not in key}
    cache = rows * (prompt + 16 + answer / 2) * 2 * sum(len(p) for key, p in layers.items() if "k_proj" in key)
    read = 2 * output.itemsize * (output.numel() + sum(p.numel() for p in layers.values()) + cache)
    token = (long - short) / answer
    print(f"2 agents in turn, {rows} rows each: prompts of {prompt} tokens and 16 sampled ones: {short:.0f} ms\n"
          f"a token behind them: {token:.2f} ms; {read / bandwidth / token:.0%} of it would do to read the "
          f"{read / 1e9:.4g} GB of weights, keys and values at the {bandwidth / 1e6:.0f} GB/s of a copy")
    for B in (1, 2, 4, 8):
        spent = milliseconds(lambda: lm.logprobs("agent_0", prompts[:B], answers[:B])[0].sum().backward())
        print(f"an update of {B} rows with {answer} more: {spent:.0f} ms, peak so far {memory_gb(DEVICE):.1f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", nargs=2, metavar=("SHAPE", "FOLDER"), help=f"write a model; {', '.join(SHAPES)}")
    parser.add_argument("--speed", metavar="FOLDER", help="time a sampled token and updates of this model")
    parser.add_argument("--compile", action="store_true", help="with --speed: as the train scripts' --compile")
    args = parser.parse_args()
    if args.build or args.speed:
        return build(*args.build) if args.build else speed(args.speed, args.compile)
    print("GiB for 2 agents and CoLLM-CC's critic, rank 16, 8 episodes, prompts of 900 tokens, 512 new ones, "
          "--micro_batch 2;\nkept for an update, and peak, without and with --gradient_checkpointing\n\n"
          "| model | base | adapters | KV cache | kept | checkpointed | peak, kept | peak, checkpointed |\n"
          "|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        print(f"| {name} |", " | ".join(f"{size:.1f}" for size in memory(shape).values()), "|", flush=True)


if __name__ == "__main__":
    main()
