"""
The language model: one frozen base in memory, one LoRA adapter per agent (and critic), sampling and log-probabilities.

    LanguageModel.generate   samples for many histories at once, rows of different agents in one batch, with a KV cache
    LanguageModel.logprobs   log pi(a | h) of given answers, with gradients for the adapters
    build_tiny               makes the base "tiny": a 1M-parameter transformer trained on a task's demonstrations
    join_ranks, gather, ...  what training on several GPUs or machines needs

In shapes B and R are rows, T and N tokens, C the hidden width, V the vocabulary, G answers to one prompt, P its tokens,
L columns of memory, K keys, D a head's width.

    python model.py out/cc-strbuild --string CLIM      # the trained team at work: one process per agent, no critic
    python model.py out/cc-strbuild --merge team       # team/agent_0, ...: plain models, adapters merged into them
"""
import argparse
import atexit
import collections
import contextlib
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import types
import warnings
import zlib

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jinja2.exceptions import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer,
                          GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast)
from transformers.cache_utils import DynamicCache
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from tasks import TASK_OPTIONS, Episode, Turn, dialogue, exit_on_error, first_line, get_task, history, write_text

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

# --- the tiny base ----------------------------------------------------------------------------------------------------

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
PLAIN_TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                  "{% if add_generation_prompt %}assistant:{% endif %}")
# the tiny base knows the rules from its demonstrations, so its template leaves the system message out
TEMPLATE = ("{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def train_bpe(texts, pattern):
    """Byte-pair encoding of texts: {token bytes: rank}, ranks 0..255 being the single bytes.

    Each distinct word (a match of pattern) counts once, and merging goes on until each is one token: train_bpe(["aab
    aab"], r"\\w+|\\s") adds b"aa" as rank 256 and b"aab" as 257.
    """
    words = [[bytes([byte]) for byte in word.encode()]
             for word in sorted({word for text in texts for word in regex.findall(pattern, text)})]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while counts := collections.Counter(pair for word in words for pair in zip(word, word[1:])):
        left, right = max(counts, key=counts.get)
        ranks[left + right] = len(ranks)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if word[i] == left and word[i + 1] == right:
                    word[i:i + 2] = [left + right]
                i += 1
    return ranks


def bpe_tokenizer(ranks, pattern, special, **options):
    """The tokenizer that transformers loads for what train_bpe returned, with special tokens behind it."""
    converter = TikTokenConverter(vocab_file=ranks, pattern=pattern, extra_special_tokens=special)
    converter.load_tiktoken_bpe = lambda ranks: ranks  # there is no file to read
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **options)


def tiny_tokenizer(task, rng):
    """The byte-level BPE of a task's own text, as tiktoken.Encoding and as the tokenizer that transformers loads."""
    texts = [message["content"] for _ in range(1500) for message in task.demonstration(rng) + task.exercise(rng)]
    ranks = train_bpe(texts, task.pattern)
    encoding = tiktoken.Encoding("tiny", pat_str=task.pattern, mergeable_ranks=ranks,
                                 special_tokens={token: len(ranks) + i for i, token in enumerate(SPECIAL)})
    return encoding, bpe_tokenizer(ranks, task.pattern, SPECIAL, pad_token="<|pad|>", eos_token="<|end|>",
                                   additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=TEMPLATE)


def build_tiny(task, folder, steps=None, lr=2e-3, width=160, layers=3, heads=5, seed=0):
    """Train the tiny base on task.demonstration and save it as an ordinary model folder; returns the folder.

    GPT-NeoX (Pythia's architecture): fused query-key-value and a plain MLP made its forward and backward faster on a
    CPU than Llama's or GPT-2's. The weights start at standard deviation width^-1/2, because with the usual 0.02 a model
    this narrow attends to everything alike for hundreds of steps. The folder appears only when it is complete.
    """
    warm_up = (steps := steps or task.base_steps) * 2 // 7  # steps on exercises alone
    os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    encoding, tokenizer = tiny_tokenizer(task, rng)
    pad, user, assistant, end = map(encoding.encode_single_token, SPECIAL)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=encoding.n_vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2048, use_parallel_residual=False, hidden_act="relu",
        tie_word_embeddings=True, initializer_range=width ** -0.5, bos_token_id=None, eos_token_id=end,
        pad_token_id=pad, rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    pool = []
    bar = tqdm(range(steps), desc=f"building {folder}", unit="step", dynamic_ncols=True)
    for step in bar:
        fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / max(1, warm_up), fall)
        if not pool or step == warm_up:  # conversations of like length share a batch, so that little is padding
            drawn = []
            for _ in range(task.base_batch * 16):
                ids, is_target = [], []  # 1 = learned: answers and what an agent is told about them
                for n, message in enumerate((
                        task.exercise if step < warm_up or rng.random() < 0.25 else task.demonstration)(rng)):
                    text = encoding.encode_ordinary(message["content"]) + [end]
                    ids += [user if message["role"] == "user" else assistant] + text
                    is_target += [0] + [int(n > 0)] * len(text)  # the item itself is random: nothing to learn there
                drawn.append((ids, is_target))
            drawn.sort(key=lambda conversation: len(conversation[0]))
            pool = [drawn[i:i + task.base_batch] for i in range(0, len(drawn), task.base_batch)]
            rng.shuffle(pool)
        batch = pool.pop()
        x = padded([ids for ids, _ in batch], pad, "cpu")  # (B, T)
        learned = padded([mask for _, mask in batch], 0, "cpu")[:, 1:].bool()  # (B, T-1)
        hidden = model.base_model(input_ids=x, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, C)
        loss = F.cross_entropy(model.get_output_embeddings()(hidden[learned]), x[:, 1:][learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with writing(folder), tempfile.TemporaryDirectory(prefix=".tiny-", dir=os.path.dirname(folder) or ".") as build:
        model.save_pretrained(os.path.join(build, "model"))
        tokenizer.save_pretrained(os.path.join(build, "model"))
        if not os.path.isdir(folder):  # two runs may have built it at once; the first one counts
            os.rename(os.path.join(build, "model"), folder)
    return folder


@contextlib.contextmanager
def writing(path):
    """What goes wrong in this block is an OSError with one sentence; for a full disk safetensors has its own kind."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


def load_tokenizer(name):
    """(tokenizer, whether its chat template knows system messages, the token that ends an answer).

    That token is what the template puts behind an answer: Gemma's is <end_of_turn>, though its eos token is <eos>, and
    GLM's is the <|user|> of the next message. A model without a template, such as GPT-2, reads plain text and ends with
    its eos token. ValueError if there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        begin = tokenizer.bos_token if tokenizer("").input_ids == [tokenizer.bos_token_id] else ""  # Llama, not GPT-2
        tokenizer.chat_template = begin + PLAIN_TEMPLATE
    talk = [{"role": role, "content": "\u00a7"} for role in ("system", "user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(talk[:2], tokenize=False)
        knows_system = text.count("\u00a7") == 2 or tokenizer.chat_template == TEMPLATE
    except TemplateError:
        knows_system = False
    special = {*tokenizer.all_special_ids, *(k for k, t in tokenizer.added_tokens_decoder.items() if t.special)}
    end = tokenizer.eos_token_id
    for messages in (talk[1:], talk[1:3]):  # where the answer is the last message its end counts for more
        after = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False).split("\u00a7")[2:3]
        ids = tokenizer("".join(after).lstrip(), add_special_tokens=False).input_ids[:1]
        end = ids[0] if ids and ids[0] in special else end
    if end is None:
        raise ValueError(f"{name} has a tokenizer without an end token; answers could not end.")
    return tokenizer, knows_system, end


def check_model(names, num_agents):
    """Before weights are loaded: ValueError with one sentence when names is no model, or A,B with not one per agent."""
    if names.count(",") not in (0, num_agents - 1):
        raise ValueError(f"--model {names} names {names.count(',') + 1} models for {num_agents} agents.")
    for name in dict.fromkeys(names.split(",")):
        if name == "tiny":
            continue
        if not name:
            raise ValueError(f"--model {names} names no model between its commas.")
        if os.path.exists(name) and not os.path.isfile(os.path.join(name, "config.json")):
            raise ValueError(f"{name} is not a model folder: it has no config.json.")
        if os.path.exists(name) and not any(file.endswith((".safetensors", ".bin")) for file in os.listdir(name)):
            raise ValueError(f"{name} is not a model folder: it has no weights.")
        try:
            AutoConfig.from_pretrained(name)
            load_tokenizer(name)
        except Exception as error:  # a chat template from anywhere can be wrong in any way
            raise ValueError(f"{name} is no folder and no model id that can be loaded: {first_line(error)}") from None


def model_folders(names, task, build=True):
    """Per agent the folder or id to load; "tiny" is built on first use and cached as out/tiny-BASE.

    Without build, ValueError with one sentence if it is not there.
    """
    folder = os.path.join("out", f"tiny-{task.base}")
    if "tiny" in names.split(",") and not os.path.isdir(folder):
        if not build:
            raise ValueError(f"{folder} is not here; play where the team was trained.")
        if not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0":
            build_tiny(task, folder)
    gather([])  # the other ranks wait for it
    folders = [folder if name == "tiny" else name for name in names.split(",")]  # one for all, or one of each
    return (folders * task.num_agents)[:task.num_agents]


def load_models(names, task, max_new_tokens, *options):
    """Per agent its LanguageModel; agents of the same folder share one, which is in memory once.

    Raises ValueError with one sentence when a folder cannot be loaded or does not work here, or when the prompts that
    this task begins with and max_new_tokens do not fit into a model's context. What does not fit later is cut, and
    counted in .truncated.
    """
    folders = model_folders(names, task)
    bases = {folder: LanguageModel(folder, *options) for folder in dict.fromkeys(folders)}
    for agent, folder in enumerate(folders):
        for item in task.eval_items + task.train_items[:100]:
            prompt = len(bases[folder].render(history(task, Episode(item), agent)))
            if prompt + max_new_tokens > bases[folder].context:
                raise ValueError(f"A prompt of {task.name} has {prompt} tokens; with {max_new_tokens} new ones it does "
                                 f"not fit into the {bases[folder].context} tokens that {folder} can read.")
    for base in bases.values():
        base.check_itself()
    return [bases[folder] for folder in folders]


def load_state(path, device):
    """What a train script's save wrote to train_state.pt; ValueError with one sentence if it cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=False)
    except Exception as error:  # of a file that is half there pickle may say anything
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None


def memory_gb(device):
    """Peak memory of this process so far: on the GPU where there is one."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


# --- several GPUs or machines -----------------------------------------------------------------------------------------


def join_ranks(device):
    """(rank, number of ranks, device) of a script that torchrun started several times; (0, 1, device) of any other.

    Every rank draws the same random numbers and knows all episodes; it plays its share of them, and computes the
    gradients of its share of a minibatch. So N ranks with N x B episodes do what one rank would do with them.
    Raises ValueError with one sentence for a device that is not there.
    """
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know less than Unicode
    if device == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device != "cpu" and not (regex.fullmatch(r"cuda(:\d+)?", device) and
                                int(device[5:] or 0) < torch.cuda.device_count()):
        raise ValueError(f"device must be cpu, or cuda where there is one, not {device}.")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, device
    use_gpu(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:  # one rank talks
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device


def use_gpu(device):
    """Make cuda:N the current one: CUDA graphs, what ranks exchange and max_memory_allocated are of the current one."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def gather(rows):
    """The lists of all ranks, joined in the order of the ranks: [1] on rank 0 and [2, 3] on rank 1 give [1, 2, 3]."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def micro_batches(episodes, tokens, size):
    """This rank's share of the episodes, as micro-batches of at most `size` rows (episode, t); none without a share.

    An episode's turns come from last to first, so that V(h_t+1) is known when h_t is learned from. Episodes are sorted
    by the token ids tokens(turn) of their first turn: rows that begin alike share a micro-batch, which computes that
    beginning once. Episodes a of two turns and b of one, size 2: [(a, 1), (a, 0)], [(b, 0)].
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    episodes = sorted(episodes, key=lambda e: tokens(e.turns[0]))
    mine = episodes[len(episodes) * rank // ranks:len(episodes) * (rank + 1) // ranks]
    rows = [(e, t) for e in mine for t in reversed(range(len(e.turns)))]
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def optimizer_step(optimizer, parameters):
    """One step along the sum of all ranks' gradients, clipped to norm 1; returns the norm that it had.

    Each rank has divided its loss by the number of rows of all of them. Raises FloatingPointError with one sentence,
    before anything has changed, when the gradient is not a number.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not norm < math.inf:
        raise FloatingPointError("a gradient is not a number; the last save is intact. Lower the learning rates and "
                                 "start again.")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# --- the base and its adapters ----------------------------------------------------------------------------------------


class Packed:
    """Token sequences in one row, without padding, in which a beginning that several of them share stands only once.

    names: whose adapter reads each; sequences of one adapter must stand together, and only those share anything.
    [[1, 2, 3], [1, 2, 4]] become ids [1, 2, 3, 4] at positions [0, 1, 2, 2], and the paths [0, 1, 2] and [0, 1, 3] say
    where the tokens of each are. Turns of an episode share the first observation, answers of a group their prompt.
    first: from where on the hidden states of each are read; with [2, 1] those of the tokens wanted = [2, 1, 3].
    known: for each what its row read before, whose keys and values the cache holds one after another. Paths count
    those tokens first; ids are only the new ones. What is known to its end reads its last token again.

    Attention goes block by block: some queries of one sequence, and the keys on the path that leads to them. The last
    layer's leaves out the queries that nobody reads.
    """
    BLOCK = 128  # queries at most; blocks with equally many blocks before them are one call of the attention kernel
    now = None  # the row under way, until the next one: checkpointing computes its forward again
    SIGN = torch.zeros(1, 1, 1, 1)  # as a mask it says: attend as the row under way

    def __init__(self, names, sequences, first, device, known=None):
        ids, position, blocks = [], [], []  # blocks: (queries, keys)
        self.groups, self.paths, path, last = collections.Counter(), [None] * len(names), [], (None, [])
        known = known or [[]] * len(names)
        *starts, past = itertools.accumulate(map(len, known), initial=0)  # past: tokens in the cache
        for row in sorted(range(len(names)), key=lambda row: (names.index(names[row]), sequences[row])):
            name, sequence = names[row], list(sequences[row])
            shared = len(os.path.commonprefix([sequence, last[1]])) if name == last[0] else 0
            kept = len(os.path.commonprefix([sequence[:-1], list(known[row])]))
            if kept > shared:
                shared, path = kept, range(starts[row], starts[row] + kept)
            new, last = len(sequence) - shared, (name, sequence)
            start = past + len(ids)
            self.paths[row] = path = [*path[:shared], *range(start, start + new)]
            self.groups[name] += new
            ids += sequence[shared:]
            position += range(shared, len(sequence))
            for start in range(shared, len(sequence), self.BLOCK):
                keys = path[:start + self.BLOCK]
                blocks.append(([token - past for token in keys[start:]], keys))
        self.ids, self.position = (integers([numbers], device) for numbers in (ids, position))  # (1, N)
        wanted = [token - past for path, start in zip(self.paths, first) for token in path[start:]]
        self.wanted, read = integers(wanted, device), set(wanted)
        self.plans = [self.plan(blocks), self.plan(  # of the last layer
            [([token for token in queries if token in read], keys) for queries, keys in blocks])]

    def plan(self, blocks):
        """Calls of the attention kernel, and where in their outputs that of each of N tokens is (0 if it has none)."""
        alike, calls, done, N = collections.defaultdict(list), [], 0, self.ids.shape[1]
        position = F.pad(self.position[0], (0, 1))  # (N + 1,), and one for what fills up a call
        place = torch.zeros_like(position)
        for queries, keys in blocks:
            if queries:
                alike[-(-len(keys) // self.BLOCK)].append((queries, keys))
        for call in alike.values():
            queries = padded([queries for queries, _ in call], N, self.ids.device)  # (n, L)
            keys = padded([keys for _, keys in call], 0, self.ids.device)  # (n, K)
            place[queries] = torch.arange(done, done + queries.numel(), device=self.ids.device).view_as(queries)
            done += queries.numel()
            calls.append((queries.clamp(max=N - 1), position[queries], keys, {}))  # {}: a mask for each window
        return calls, place[:N]

    @staticmethod
    def mask(at, keys, window, dtype):
        """What queries may not attend to: keys later than their positions `at`, and those that a window left behind."""
        of_key = torch.arange(keys.shape[1], device=at.device)
        hidden = of_key > at[:, :, None]  # (n, L, K)
        if window:
            hidden |= of_key <= at[:, :, None] - window
        return torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill_(hidden, -math.inf)[:, None]

    @staticmethod
    def attention(module, query, key, value, attention_mask, sliding_window=None, **options):
        """Attention for transformers: as it is, by torch's kernel, or of the row under way (mask: Packed.SIGN)."""
        if getattr(module, "kept", None):
            return one_more(module, query, key, value, attention_mask, sliding_window, options.get("scaling"))
        if attention_mask is None or attention_mask.data_ptr() != Packed.SIGN.data_ptr():  # some models slice it
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        (calls, place), outputs = Packed.now.plans[module is Packed.now.last], []
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N or past + N, heads, D)
        for queries, at, keys, masks in calls:
            q, k, v = (x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
                       for x, index in ((query, queries), (key, keys), (value, keys)))  # (n, heads, L or K, D)
            if sliding_window not in masks:
                masks[sliding_window] = Packed.mask(at, keys, sliding_window, q.dtype)
            out, _ = sdpa_attention_forward(module, q, k, v, masks[sliding_window], **options | {"is_causal": False})
            outputs.append(out.flatten(0, 1))  # (n x L, heads, D)
        return torch.cat(outputs).index_select(0, place)[None], None  # (1, N, heads, D)


def one_more(module, query, key, value, attention_mask, sliding_window, scale):
    """Attention of each row's next tokens, whose keys and values go to a place in memory that stays (see write_on).

    module.kept: keys, values (R, KV heads, L, D) and the columns (G,) where the new ones, (R, KV heads, G, D), go;
    attention_mask: (R, 1, G, L), 0 or -inf. Heads that share keys are more queries to them, so no key is repeated.
    """
    keys, values, at = module.kept
    keys.index_copy_(2, at, key)
    values.index_copy_(2, at, value)
    keys, values = (x[:, :, :attention_mask.shape[-1]] for x in (keys, values))
    if sliding_window:
        behind = torch.arange(keys.shape[2], device=at.device) <= at[-1] - sliding_window
        attention_mask = attention_mask.masked_fill(behind, -math.inf)
    (R, heads, G, D), shared = query.shape, query.shape[1] // keys.shape[1]
    mask = attention_mask.expand(-1, shared, -1, -1).reshape(R, 1, shared * G, -1)
    out = F.scaled_dot_product_attention(query.reshape(R, -1, shared * G, D), keys, values, attn_mask=mask, scale=scale)
    return out.reshape(R, heads, G, D).transpose(1, 2).contiguous(), None


AttentionInterface.register("packed", Packed.attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def record(step, state):
    """step as TorchScript, which runs it without Python, or step itself where Python decides by numbers in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather compile, which takes minutes on a CPU
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.TracerWarning.ignore_lib_warnings()  # PyTorch's own lines are harmless
        try:
            return torch.jit.trace(step, tuple(x.clone() for x in state), check_trace=False)
        except Exception:  # tracing fails in any way, by the model; an error of step's own comes again when it runs
            return step


def room(columns):
    """As many columns of keys, and up to 7 more: attention wants a multiple of 8."""
    return -(-columns // 8) * 8


def integers(rows, device):
    """torch.tensor of lists of integers of one length, by way of numpy: ten times as fast, and there are many."""
    return torch.from_numpy(np.array(rows, dtype=np.int64)).to(device)


def padded(rows, filler, device, left=False):
    """Lists made one length, as a tensor: [[1, 2], [3]] and filler 0 give [[1, 2], [3, 0]], on the left [0, 3]."""
    length = max(map(len, rows))
    fill = [[filler] * (length - len(row)) for row in rows]
    return integers([more + list(row) if left else list(row) + more for more, row in zip(fill, rows)], device)


def sample(logits, luck, temperature, top_p):
    """Tokens and log-probabilities (.., G) for logits (.., G, V) and one random number in [0, 1) each (.., G)."""
    logp = (logits.float() / temperature).log_softmax(-1)
    kept = logp.exp()
    if top_p < 1:
        ordered, order = kept.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0.0)
        kept = torch.zeros_like(kept).scatter_(-1, order, ordered)
    edges = kept.cumsum(-1)  # inverse of the cumulative distribution: one random number a token, not V
    token = torch.searchsorted(edges, luck[..., None] * edges[..., -1:], right=True).clamp(max=logp.shape[-1] - 1)
    return token[..., 0], logp.gather(-1, token)[..., 0]


def unfinished(busy, groups):
    """Which of R rows go on: the busy ones, and finished ones where one group would have fewer than another.

    busy: (R,), groups of equally many rows one after another, which they remain: [True, False, False, True] gives
    [0, 3], in one group and in two; [True, True, False, True] gives [0, 1, 3] in one and [0, 1, 3, 2] in two. Where
    that takes 1.4 times the busy rows, they go on alone: [True, True, False, False] gives [0, 1] in two groups, too.
    """
    each = busy.view(groups, -1)
    keep = each.int().argsort(dim=1, descending=True, stable=True)[:, :each.sum(1).max()]
    keep = (keep + each.shape[1] * torch.arange(groups)[:, None]).flatten()
    return keep if len(keep) < 1.4 * busy.sum() else busy.nonzero()[:, 0]


class FoldedLinear(torch.autograd.Function):
    """x (W + scale B A)^T + bias: one matrix product forward and one backward, for models whose W is cheap to copy.

    The gradients of A and B go through rank r all the same; x A^T is made again instead of being kept.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale):
        folded = torch.addmm(W, B, A, alpha=scale)
        ctx.save_for_backward(x, folded, A, B)
        ctx.scale = scale
        return F.linear(x, folded, bias)

    @staticmethod
    def backward(ctx, grad):
        x, folded, A, B = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)  # (rows x T, inputs), (rows x T, outputs)
        grad_x = grad @ folded if ctx.needs_input_grad[0] else None
        grad_A = ctx.scale * ((grads @ B).t() @ rows)
        grad_B = (ctx.scale * (F.linear(rows, A).t() @ grads)).t()  # 20% faster than the other way round
        return grad_x, None, None, grad_A, grad_B, None


def lora_forward(layer, x):
    """y = x W^T + scale (x A^T) B^T, where every row of x has its own A and B; x: (B, T, inputs).

    PEFT can mix adapters in a batch too, but only without training and looking up each row's adapter by name in every
    layer. Here all adapters' A are one matrix, and of x A^T each row keeps what its own adapter gave. Layers that read
    the same x, such as query, key and value, share that product: the first one makes it for all.
    """
    y = layer.base_layer(x.flatten(0, -2))  # (B T, outputs)
    if layer.adapters:
        A, B, select = layer.adapters  # (siblings x n x rank, inputs) or None, (n x rank, outputs)
        if A is not None:
            low = F.linear(x, A).unflatten(-1, (-1, len(B)))  # (B, T, siblings, n x rank)
            if select is not None:
                low = low.reshape(len(select), -1, *low.shape[-2:]) * select  # OPT's MLP reads (B T, inputs)
            layer.shared[:] = low.flatten(0, -3).unbind(1)
        y = y.addmm_(layer.shared.pop(0), B, alpha=layer.scale)
    return y.view(*x.shape[:-1], -1)


class LanguageModel:
    """A frozen causal LM and its tokenizer, with any number of LoRA adapters.

    generate, hidden and logprobs take `names`: per row its adapter's, or None for the base alone; rows of one adapter
    must stand together. Which of the ways of computing the same numbers is taken:

        prompts; updates on a CPU               Packed: one row without padding, shared beginnings once
        updates on a GPU                        padded rows, which flash attention reads faster
        sampling                                write_on: memory that stays, on a GPU as a CUDA graph
        sampling with a small base in float32   fold: one matrix per adapter instead of three; steps are recorded
        several answers to one prompt           one row of the batch, that many tokens at a time
        attention other than torch's            padded rows and the library's own masks and cache
    """

    def __init__(self, folder, device="cpu", rank=16, attn=None, checkpointing=False, compiled=False):
        self.folder, self.device, self.rank, self.peft = folder, device, rank, None
        use_gpu(device)
        try:
            self.tokenizer, self.knows_system, self.end = load_tokenizer(folder)
            self.causal_lm = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32, attn_implementation=attn)
            config = self.causal_lm.config.get_text_config()
            # layers with a state instead of keys and values (Qwen3.5, LFM2): no row can share or leave anything
            self.recurrent = any(hasattr(layer, "update_conv_state") for layer in DynamicCache(config=config).layers)
        except Exception as error:  # weights from anywhere can be wrong in any way
            raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from None
        self.causal_lm.to(device).eval().requires_grad_(False)
        self.hidden_size = self.causal_lm.get_input_embeddings().weight.shape[1]
        self.pad = self.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id  # masked everywhere
        context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's
        self.context = context or 10 ** 9
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # one longer row would turn all other rows' positions, kept keys aside
            self.context = min(self.context, rope.get("original_max_position_embeddings", self.context))
        if rope.get("rope_type") in ("dynamic", "longrope"):  # frequencies do not change within the context;
            for module in self.causal_lm.modules():  # to look makes a GPU wait, which no graph allows
                if hasattr(module, "rope_type"):
                    module.rope_type = "default"
        self.truncated = 0  # prompts that lost their oldest tokens because the context was full
        divisor, factor, multiplier, self.softcap = (getattr(config, name, None) for name in (
            "logits_scaling", "logit_scale", "lm_head_multiplier", "final_logit_softcapping"))
        self.logit_scale = (factor or 1.0) * (multiplier or 1.0) / (divisor or 1.0)  # Granite, Cohere, Falcon; Gemma 2
        self.siblings = []  # lists of LoRA layers that read the same input
        self.folded = []  # adapters that are one matrix with the base, while sampling
        weights = list(self.causal_lm.parameters())
        self.small = sum(p.numel() for p in weights) < 2e7 and weights[0].dtype == torch.float32  # W is cheap to copy
        some = torch.cat([p.flatten()[:64] for p in weights])
        self.fingerprint = zlib.crc32(some.bfloat16().cpu().view(torch.int16).numpy().tobytes())  # in any precision
        self.set_rows([None])  # the base alone, unless it is said whose rows come
        self.attentions = [m for m in self.causal_lm.modules() if getattr(m, "layer_idx", None) is not None]
        # a window of which only masks know (PhiMoE)
        masked_window = getattr(config, "sliding_window", None) and not any(
            "sliding_window=" in inspect.getsource(type(m).forward) for m in self.attentions)
        # models whose attention can be replaced read rows without padding and shared beginnings once
        self.packs = config._attn_implementation == "sdpa" and self.causal_lm._supports_attention_backend and not (
            self.recurrent or masked_window or any(getattr(config, name, None) for name in (
                # Llama 4's masks are peculiar, as are DeepSeek's keys; Gemma 3n's layers share them
                "attention_chunk_size", "kv_lora_rank", "num_kv_shared_layers")))
        self.shares = self.packs and not getattr(config, "sliding_window", None)
        if self.packs:
            self.causal_lm.set_attn_implementation("packed")
        self.stays = device.startswith("cuda") or compiled  # memory for the longest answers is there from the beginning
        self.recorded = {}  # steps of write_on that run without Python
        layers = max((m for m in self.causal_lm.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        self.compiled = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers if compiled]
        # the last layer works only where its output is read
        self.last_attention = next((m for m in layers[-1].children() if m in self.attentions), None)
        mlp = getattr(layers[-1], "mlp", None)
        if mlp is not None and len(inspect.signature(mlp.forward).parameters) == 1 and not any(
                "expert" in key or "router" in key for key, _ in mlp.named_parameters()):
            self.whole_mlp, mlp.forward = mlp.forward, self.last_mlp
        self.targets = "all-linear"
        if any("expert" in key for key, _ in self.causal_lm.named_parameters()):  # of those attention alone learns
            self.targets = [key for key, m in self.causal_lm.named_modules()
                            if isinstance(m, torch.nn.Linear) and "att" in key]
        if checkpointing:
            found = [m for m in self.causal_lm.modules() if isinstance(m, GradientCheckpointingLayer)]
            if not found:
                raise ValueError(f"{folder} is of a kind that has no gradient checkpointing.")
            for module in found:  # not the library's own way, which works in training mode only and with dropout
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False,
                                                   preserve_rng_state=False)

    def add_adapter(self, name, folder=None):
        """Add a fresh LoRA adapter, or, as a model's first, the one saved in folder; returns its parameters (fp32).

        Raises ValueError with one sentence when the one in folder was trained on another base.
        """
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=self.targets, task_type="CAUSAL_LM")
        if folder is not None:
            self.check_base(folder)
            self.peft = PeftModel.from_pretrained(self.causal_lm, folder, adapter_name=name)
        elif self.peft is None:
            self.peft = get_peft_model(self.causal_lm, config, adapter_name=name)
        else:
            self.peft.add_adapter(name, config)
        parameters = [p for key, p in self.causal_lm.named_parameters() if f".{name}." in key]
        for p in parameters:
            p.requires_grad_(True)
            p.data = p.data.float()
        self.small &= all(isinstance(layer.base_layer, torch.nn.Linear) for layer in self.lora_layers())  # not GPT-2's
        for layer in self.lora_layers():
            layer.scale, layer.adapters = layer.scaling[name], None  # the scale is the same for all
            # torch.compile takes a method for the same code in all layers, a partial for other code in each (8 at most)
            layer.forward = (functools.partial(self.small_forward, layer) if self.small
                             else types.MethodType(lora_forward, layer))
        self.siblings = self.siblings or self.find_siblings()
        return parameters

    @torch.no_grad()
    def find_siblings(self):
        """Lists of LoRA layers that read the same tensor, in the order in which they do; others stand alone."""
        readers = collections.defaultdict(list)
        hooks = [layer.register_forward_pre_hook(lambda layer, inputs: readers[inputs[0]].append(layer))
                 for layer in self.lora_layers()]
        self.set_rows([None], integers([1], self.device))  # where the last MLP reads less than its layer's attention
        self.causal_lm(input_ids=integers([[self.end] * 2], self.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        found = list(readers.values())
        found += [[layer] for layer in self.lora_layers() if not any(layer in layers for layers in found)]
        for layers in found:
            shared = []
            for layer in layers:
                layer.shared, layer.joined = shared, None
        return found

    def check_base(self, folder):
        """Compare what save_adapter recorded in folder with this base; ValueError with one sentence if they differ."""
        path = os.path.join(folder, "base.json")
        if os.path.exists(path):
            with open(path) as file:
                base = json.load(file)
            if base["fingerprint"] != self.fingerprint:
                raise ValueError(f"{folder} was trained on another base: {base['model']}, whose weights are not those "
                                 f"of {self.folder}.")

    def check_itself(self):
        """Raise ValueError with one sentence unless sampling, updates and the plain forward agree on log-probabilities.

        A model can be peculiar in any way (a head in front of its head, attention of its own, ...); a short cut that
        holds for others would then give wrong numbers without a word.
        """
        compiled, self.compiled = self.compiled, []  # compiling takes longer than all of this
        names, memory, luck = ["check_0"] * 2 + ["check_1"] * 2, {}, torch.rand(4, 3)
        prompts = [self.render([{"role": "user", "content": text}]) for text in ["one"] * 2 + ["one two three"] * 2]
        try:
            for name in names[::2]:
                for p in self.add_adapter(name):
                    torch.nn.init.normal_(p, std=0.02)
            end, self.end = self.end, -1  # no answer may end at once
            for turn in range(2):
                tokens, sampled = self.generate(names, prompts, luck, 1.0, 1.0, range(4), memory)
                learned, _ = self.logprobs(names, prompts, tokens)
                learned.sum().backward()
                plain = []
                for name, prompt, answer in zip(names, prompts, tokens):
                    self.set_rows([name])
                    with torch.no_grad():
                        ids = integers([prompt + answer], self.device)
                        logits = self.causal_lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1]
                    plain.append(logits.float().log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0])
                plain, sampled = torch.cat(plain), torch.tensor(sum(sampled, []), device=self.device)
                error = (torch.stack([sampled, learned]) - plain).abs().mean(1).max().item()  # NaN if any is
                if not error < (0.01 if self.causal_lm.dtype == torch.float32 else 0.2):
                    raise ArithmeticError(f"log-probabilities differ by {error:.2g}")
                prompts = [prompt + answer + [end] for prompt, answer in zip(prompts, tokens)]
        except Exception as error:  # whatever it does not like
            raise ValueError(f"{self.folder}, a model of type {self.causal_lm.config.model_type}, does not work here: "
                             f"{first_line(error)}") from None
        self.peft.unload()
        self.peft, self.siblings, self.recorded, self.compiled, self.end = None, [], {}, compiled, end

    def lora_layers(self):
        return [module for module in self.causal_lm.modules() if isinstance(module, LoraLayer)]

    def small_forward(self, layer, x):
        """lora_forward for models whose W is cheap to copy: one matrix W + scale B A instead of three."""
        if not self.folded and self.alone is None:
            return lora_forward(layer, x)
        if not self.folded:
            return FoldedLinear.apply(x, layer.base_layer.weight, layer.base_layer.bias,
                                      layer.lora_A[self.alone].weight, layer.lora_B[self.alone].weight, layer.scale)
        if layer.joined:  # the first of those that read x, which makes the products of all
            W, bias, sizes = layer.joined
            rows, counts = x.flatten(0, -2), [rows for _, rows in self.groups]
            if self.even == len(self.folded):
                y = torch.baddbmm(bias, rows.view(self.even, -1, rows.shape[-1]), W.mT)
            else:
                parts = rows.split([n * len(rows) // sum(counts) for n in counts])
                y = torch.cat([F.linear(part, W[self.folded.index(name)], bias)
                               for (name, _), part in zip(self.groups, parts)])
            layer.shared[:] = y.view(*x.shape[:-1], -1).split(sizes, -1)
        return layer.shared.pop(0)

    def set_rows(self, names, wanted=None):
        """Say whose rows, or tokens of the one row, come next: of an adapter, or None for the base alone.

        wanted: the positions in all rows together whose hidden states are read, or None for all of them. Both hold
        until the next call, because checkpointing computes forwards again.
        """
        self.groups = groups = [(name, len(list(rows))) for name, rows in itertools.groupby(names)]
        self.alone = groups[0][0] if self.small and len(groups) == 1 else None  # a small model's adapter that reads all
        self.even = len(groups) if len({rows for _, rows in groups}) == 1 else 1  # how many groups of equally many rows
        self.wanted = wanted
        if self.folded or self.alone is not None:
            return  # small_forward looks up what it needs
        names, select = [name for name, _ in groups if name is not None], None
        if len(groups) > 1:  # 1 where a row or token (.., n x rank) reads its own adapter
            select = torch.block_diag(*(torch.full((rows, self.rank if name else 0), 1.0) for name, rows in groups))
            select = select.to(self.device, self.causal_lm.dtype)[:, None, None]

        def stack(weights, dim):  # in the base's precision, or an fp32 copy of every input would be kept for backward
            return (torch.cat(weights, dim) if len(weights) > 1 else weights[0]).to(self.causal_lm.dtype)

        for layers in self.siblings:
            A = names and stack([layer.lora_A[name].weight for layer in layers for name in names], 0)
            for layer in layers:
                layer.adapters = names and (A, stack([layer.lora_B[name].weight for name in names], 1).t(), select)
                A = None  # the first layer makes the product for all

    @torch.no_grad()
    def fold(self, names=()):
        """While sampling, one matrix per adapter instead of three, for small models only; without names, no longer."""
        self.folded = list(dict.fromkeys(names)) if self.small and None not in names else []
        for layers in self.siblings:
            bases, layers[0].joined = [layer.base_layer for layer in layers], None
            if self.folded:
                W = torch.stack([torch.cat([base.weight + layer.get_delta_weight(name)
                                            for base, layer in zip(bases, layers)]) for name in self.folded])
                biases = [W.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
                layers[0].joined = W, torch.cat(biases), list(map(len, biases))  # W: (adapters, outputs, inputs)

    def render(self, messages, new_tokens=None):
        """Token ids of a history in the model's own chat format, up to where the answer begins; thinking is off.

        With new_tokens the oldest tokens go, and that is counted, where so many new ones would not fit behind them.
        """
        if messages[0]["role"] == "system" and not self.knows_system:
            rules, first, *rest = messages
            messages = [first | {"content": f"{rules['content']}\n\n{first['content']}"}, *rest]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                  enable_thinking=False)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if new_tokens is None or len(ids) + new_tokens <= self.context:
            return ids
        self.truncated += 1
        return ids[len(ids) - max(1, self.context - new_tokens):]

    def decode(self, tokens):
        """Texts of B lists of token ids, special tokens left out."""
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    @torch.inference_mode()
    def generate(self, names, prompts, luck, temperature=1.0, top_p=1.0, rows=(), memory=None):
        """Sample one answer per row: (tokens, logps), two lists of B lists of equal lengths.

        prompts: B lists of token ids; luck: (B, longest answer) random numbers in [0, 1), one for each token that may
        be sampled, so that a row's answer does not depend on its company. An answer that stopped by itself ends with
        the end token, one that was cut does not. logps are of the softmax at `temperature`, before top_p cuts its tail.

        memory: a dict in which the first prompt of each of `rows` (any names) is kept with its keys and values, and of
        which a later prompt of the same row, such as the next turn's, uses what it begins with.
        """
        luck = luck.to(self.device)
        # G answers to one prompt are one row of the batch, G tokens at a time: its keys and values are read once
        runs = [len(list(run)) for _, run in itertools.groupby(zip(names, prompts))]
        G = math.gcd(*runs) if self.shares else 1
        names, prompts = names[::G], prompts[::G]
        mask = padded([[1] * len(p) for p in prompts], 0, self.device, left=True).bool()  # (B / G, P), 1 = not padding
        tokens = torch.full(luck.shape, -1, device=self.device)  # -1 = not sampled
        logps = torch.zeros(luck.shape, device=self.device)
        self.fold(names)
        if self.packs:
            more = G * (luck.shape[1] if self.stays else min(64, luck.shape[1]))
            logits, kept = self.prefill(names, prompts, [rows[k:k + G] for k in range(0, len(rows), G)], memory,
                                        room(mask.shape[1] + more))  # (B / G, V)
            logits = logits[:, None].expand(-1, G, -1)
            ids, logp = sample(logits, luck[:, 0].view(-1, G), temperature, top_p)  # (B / G, G)
            tokens[:, 0], logps[:, 0] = ids.flatten(), logp.flatten()
            self.write_on(names, kept, mask, ids, luck, tokens, logps, temperature, top_p)
        else:
            self.write_plainly(names, prompts, mask, luck, tokens, logps, temperature, top_p)
        self.fold()
        lengths = (tokens >= 0).sum(1).tolist()
        return tuple([row[:n] for row, n in zip(rows.tolist(), lengths)] for rows in (tokens, logps))

    def write_plainly(self, names, prompts, mask, luck, tokens, logps, temperature, top_p):
        """What generate does with models that cannot do what write_on asks for: the library's masks and cache."""
        self.set_rows(names)
        cache = DynamicCache(config=self.causal_lm.config) if self.recurrent else DynamicCache()
        ids = padded(prompts, self.pad, self.device, left=True)  # (B, P), then (B, 1)
        position = (mask.long().cumsum(1) - 1).clamp(min=0)
        alive = torch.ones_like(ids[:, :1], dtype=torch.bool)
        for t in range(luck.shape[1]):
            logits = self.causal_lm(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                                    logits_to_keep=1).logits
            ids, logp = sample(logits[:, -1:], luck[:, t:t + 1], temperature, top_p)
            tokens[:, t:t + 1], logps[:, t:t + 1] = torch.where(alive, ids, -1), torch.where(alive, logp, 0.0)
            alive &= ids != self.end
            if not alive.any():
                break
            position, mask = position[:, -1:] + 1, F.pad(mask, (0, 1), value=True)

    def write_on(self, names, kept, mask, ids, luck, tokens, logps, temperature, top_p):
        """What generate does from the second token on, in memory that stays, so that it can be repeated as it is.

        Launching hundreds of small operations per token takes Python longer than they take. On a GPU a CUDA graph
        launches them at once; finished rows go on to the end, because the weights are read once for all rows. On a CPU
        those of a small model are recorded once for all calls, and finished rows are dropped.
        kept: see prefill; mask: (R, P); ids: (R, G); luck, tokens, logps: (R x G, longest answer).
        """
        self.set_rows(names)
        (R, G), P, T, device = ids.shape, mask.shape[1], luck.shape[1], ids.device
        L = room(P + G * T)
        columns, at = torch.arange(L, device=device), torch.arange(P, P + G, device=device)
        own = torch.arange(L - P, device=device) % G == torch.arange(G, device=device)[:, None]
        allowed = torch.cat([mask[:, None].expand(-1, G, -1), own.expand(R, -1, -1)], 2)  # (R, G, L): prompt and own
        answer = torch.arange(R * G, device=device).view(R, G)  # which ones these rows are
        last = (mask.sum(1, keepdim=True) - 1).expand(-1, G)  # positions of the prompts' last tokens
        t, alive = torch.ones(1, dtype=torch.long, device=device), ids != self.end
        weights = [layers[0].joined[0] for layers in self.siblings if self.folded]

        def step(columns, t, at, luck, tokens, logps, answer, ids, last, alive, allowed, *memory):
            for module in self.attentions:
                module.kept = *memory[2 * module.layer_idx:][:2], at
            for layers, W in zip(self.siblings, memory[len(kept):]):
                layers[0].joined = W, *layers[0].joined[1:]
            open_to = allowed[:, :, :columns.shape[0]] & (columns <= at[-1])
            # in numbers, or every layer would make them again
            attend = torch.zeros_like(open_to, dtype=self.causal_lm.dtype).masked_fill_(~open_to, -math.inf)
            logits = self.causal_lm(input_ids=ids, attention_mask=attend[:, None], position_ids=last + t,
                                    use_cache=False, logits_to_keep=G).logits
            token, logp = sample(logits, luck[answer, t], temperature, top_p)
            # tokens[...] = would record the sizes of a single row
            tokens.index_put_((answer, t), torch.where(alive, token, -1))
            logps.index_put_((answer, t), torch.where(alive, logp, 0.0))
            ids.copy_(token)
            alive.logical_and_(token != self.end)
            at.add_(G)
            t.add_(1)
            return alive

        usual = [layer.forward for layer, _ in self.compiled]
        for layer, forward in self.compiled:
            layer.forward = forward
        repeat = step
        for k in range(1, T):
            if not self.stays or k % 16 == 1:  # looking makes a GPU wait
                busy = alive.any(1)
                if not busy.any():
                    break
                if not self.stays and busy.float().mean() < 0.7:  # copying for each single row costs more
                    keep = unfinished(busy, self.even)
                    answer, ids, last, alive, allowed, *kept = (
                        x.index_select(0, keep) for x in (answer, ids, last, alive, allowed, *kept))
                    names = [names[row] for row in keep.tolist()]
                    self.set_rows(names)
                    repeat = step
            K = L if self.stays else room(P + G * k)
            if kept[0].shape[2] < K:
                kept = [F.pad(x, (0, 0, 0, min(L, K + 64 * G) - x.shape[2])) for x in kept]
            state = (columns[:K], t, at, luck, tokens, logps, answer, ids, last, alive, allowed, *kept, *weights)
            if self.even == len(self.folded) and not self.stays:
                kind = G, self.even, temperature, top_p  # all that Python decides in a step
                if kind not in self.recorded:
                    self.recorded[kind] = record(step, state)
                repeat = self.recorded[kind]
            repeat(*state)
            if k == 1 and ids.is_cuda:  # the first time was also to warm up
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(*state)
                repeat = lambda *_: graph.replay()
        for module in self.attentions:
            module.kept = None
        for (layer, _), forward in zip(self.compiled, usual):
            layer.forward = forward

    def prefill(self, names, prompts, rows, memory, columns):
        """Read B prompts, P tokens at most: logits (B, V) of their ends, and their keys and values.

        Those are one tensor (B, KV heads, columns, D) for the keys of each layer in turn and one for its values, with
        the prompts' ends at column P and room behind. rows: for each prompt the names under which memory keeps it.
        """
        B, P, logits, cache = len(prompts), max(map(len, prompts)), [], []
        for k in range(0, B, 16):  # 16 prompts at a time, whose activations fit into a CPU's caches
            some, part = prompts[k:k + 16], DynamicCache()
            known = [memory.get(same[0], ([], [])) for same in rows[k:k + 16]]
            past = [torch.cat(x, 1)[None] for x in zip(*(kept for _, kept in known if kept))]
            for layer, pair in enumerate(zip(past[::2], past[1::2])):
                part.update(*pair, layer)
            row, inputs = self.pack(names[k:k + 16], some, [len(p) - 1 for p in some], [prompt for prompt, _ in known])
            logits.append(self.causal_lm(**inputs, past_key_values=part, logits_to_keep=row.wanted).logits[0])
            where = padded(row.paths, 0, self.device, left=True)  # (rows, longest)
            read = [x[0] for layer in part.layers for x in (layer.keys, layer.values)]  # (KV heads, tokens, D)
            cache = cache or [x.new_zeros(B, x.shape[0], columns, x.shape[2]) for x in read]
            for x, kept in zip(read, cache):
                x = x.index_select(1, where.flatten()).unflatten(1, where.shape).transpose(0, 1)
                kept[k:k + 16, :, P - where.shape[1]:P] = x
            for b, (same, prompt) in enumerate(zip(rows[k:k + 16], some), k):
                if new := [name for name in same if name not in memory]:
                    own = [kept[b, :, P - len(prompt):P].clone() for kept in cache]  # without the room behind it
                    memory.update(dict.fromkeys(new, (prompt, own)))
        return torch.cat(logits), cache

    def pack(self, names, sequences, first, known=None):
        """Make these sequences the row under way: that row, and how a model is told to read it."""
        Packed.now = row = Packed(names, sequences, first, self.device, known)
        row.last = self.last_attention
        self.set_rows(row.groups.elements(), row.wanted.unique())
        return row, {"input_ids": row.ids, "position_ids": row.position, "attention_mask": Packed.SIGN}

    def last_mlp(self, x):
        """The last layer's MLP where its output is read, and 0 elsewhere: nothing comes after it but that."""
        if self.wanted is None or len(self.groups) > 1:
            return self.whole_mlp(x)
        out = self.whole_mlp(x.flatten(0, 1)[self.wanted][None])[0]  # (N, C)
        return torch.zeros_like(x).flatten(0, 1).index_copy(0, self.wanted, out).view_as(x)

    def hidden(self, names, sequences, first):
        """Hidden states (N, C) of B token-id lists from position first[b] to the end of each, one after another.

        Where beginnings cannot be shared, rows are padded on the right, where causal attention needs no mask.
        """
        if self.packs and self.device == "cpu":  # flash attention of padded rows is faster on a GPU
            row, inputs = self.pack(names, sequences, first)
            wanted = row.wanted  # (N,), where several sequences may want the same token
        else:
            inputs = {"input_ids": padded(sequences, self.pad, self.device)}  # (B, T)
            T = inputs["input_ids"].shape[1]
            wanted = integers([b * T + t for b, (s, start) in enumerate(zip(sequences, first))
                               for t in range(start, len(s))], self.device)
            self.set_rows(names, wanted)
        states = self.causal_lm.base_model(**inputs, use_cache=False).last_hidden_state  # (1 or B, T, C)
        return states.flatten(0, 1)[wanted]

    def logprobs(self, names, prompts, tokens, temperature=1.0):
        """log pi of every sampled token and the entropy there, in nats, both (N,): answers' tokens one after another.

        Vocabulary logits are computed where an answer's token is predicted and nowhere else.
        """
        hidden = self.hidden(names, [p + t[:-1] for p, t in zip(prompts, tokens)], [len(p) - 1 for p in prompts])
        sampled = integers([token for t in tokens for token in t], self.device)
        logits = self.causal_lm.get_output_embeddings()(hidden).float()  # (N, V)
        if self.logit_scale != 1:  # multiplying N x V numbers by 1 takes time, too
            logits = logits * self.logit_scale
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        if temperature != 1:
            logits = logits / temperature
        logp = logits.log_softmax(-1)
        entropy = -logp.detach().exp().mul_(logp.detach()).sum(-1)
        return logp.gather(1, sampled[:, None])[:, 0], entropy

    def adapter_state(self):
        """All adapters' weights, for train_state.pt."""
        return {key: p.detach().clone() for key, p in self.causal_lm.named_parameters() if "lora_" in key}

    def load_adapter_state(self, state):
        """Set all adapters' weights to what adapter_state gave."""
        for key, p in self.causal_lm.named_parameters():
            if "lora_" in key:
                p.data.copy_(state[key])

    def save_adapter(self, name, out_dir):
        """Write out_dir/name/ as PEFT does, and which base it is for; each file appears whole or not at all."""
        with writing(f"{out_dir}/{name}"), tempfile.TemporaryDirectory(dir=out_dir, prefix=".saving-") as build:
            self.peft.save_pretrained(build, selected_adapters=[name])
            write_text(os.path.join(build, name, "base.json"),
                       json.dumps({"model": self.folder, "fingerprint": self.fingerprint}))
            os.makedirs(os.path.join(out_dir, name), exist_ok=True)
            for file in os.listdir(os.path.join(build, name)):
                os.replace(os.path.join(build, name, file), os.path.join(out_dir, name, file))


def generate(lms, rows, prompts, luck, temperature=1.0, top_p=1.0, memory=None):
    """LanguageModel.generate for agents whose bases may differ, one batch per base: (tokens, logps, texts).

    lms: per agent; rows: the (episode, agent) of each, those of one agent standing together.
    """
    tokens, logps, texts = [], [], []
    for lm, group in itertools.groupby(range(len(rows)), lambda row: lms[rows[row][1]]):
        own = list(group)
        sampled = lm.generate([f"agent_{rows[row][1]}" for row in own], [prompts[row] for row in own], luck[own],
                              temperature, top_p, [rows[row] for row in own], memory)
        tokens, logps, texts = tokens + sampled[0], logps + sampled[1], texts + lm.decode(sampled[0])
    return tokens, logps, texts


# --- decentralised execution ------------------------------------------------------------------------------------------


def agent_process(connection, folder, adapter, agent, device, seed, limit, temperature, top_p):
    """One agent, alone: it loads the base and its own adapter, and sees only the histories that it is sent."""
    torch.set_num_threads(1)
    try:
        lm = LanguageModel(folder, device)
        lm.add_adapter("agent", adapter)
    except Exception as error:  # an adapter may be broken in any way
        return connection.send(ValueError(f"{adapter} cannot work: {first_line(error)}"))
    generator = torch.Generator().manual_seed((seed * 1000 + agent) % 2 ** 63)
    with contextlib.suppress(EOFError):  # where another agent cannot work nobody says goodbye
        while (messages := connection.recv()) is not None:
            tokens, _ = lm.generate(["agent"], [lm.render(messages, limit)], torch.rand(1, limit, generator=generator),
                                    temperature, top_p)
            connection.send(lm.decode(tokens)[0])


def merge(folder, adapter, target):
    """Write the base in folder with an adapter merged into it as an ordinary model folder, whole or not at all."""
    lm = LanguageModel(folder)
    lm.check_base(adapter)
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    with writing(target), tempfile.TemporaryDirectory(prefix=".merge-", dir=os.path.dirname(target) or ".") as build:
        model = PeftModel.from_pretrained(lm.causal_lm, adapter).merge_and_unload()
        model.to(AutoConfig.from_pretrained(folder).dtype or torch.float32)
        model.save_pretrained(os.path.join(build, "model"))
        AutoTokenizer.from_pretrained(folder).save_pretrained(os.path.join(build, "model"))
        os.rename(os.path.join(build, "model"), target)
    print(f"{target} is {folder} with {adapter} merged into it")


def main():
    parser = argparse.ArgumentParser(description="A trained team at work: one process per agent, no critic.")
    parser.add_argument("out_dir", help="folder of a run, such as out/cc-strbuild")
    parser.add_argument("--string", help="strbuild: what to build (default: the first held-out item)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the agents' sampling")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--merge", metavar="FOLDER", help="play nothing; write plain models FOLDER/agent_0, ...")
    args = parser.parse_args()
    with exit_on_error(parser):
        join_ranks(args.device)  # is it there?
        try:
            with open(os.path.join(args.out_dir, "config.json")) as file:
                config = json.load(file)
        except (OSError, ValueError):
            raise ValueError(f"{args.out_dir} is not the folder of a run: it has no readable config.json.") from None
        if not isinstance(config, dict) or "out_dir" not in config:
            raise ValueError(f"{args.out_dir} is not the folder of a run: its config.json is of something else.")
        if not os.path.isdir(os.path.join(args.out_dir, "agent_0")):
            raise ValueError(f"{args.out_dir} has no trained agents yet.")
        task = get_task(config["task"], **{name: config[name] for name in TASK_OPTIONS if name in config})
        if args.string is not None and config["task"] != "strbuild":
            raise ValueError(f"--string is for strbuild; this team plays {config['task']}.")
        item = task.check({"string": args.string}) if args.string is not None else task.eval_items[0]
        parts = [(folder, os.path.join(args.out_dir, f"agent_{agent}"))
                 for agent, folder in enumerate(model_folders(config["model"], task, build=False))]
        if args.merge is not None:
            if os.path.exists(args.merge):
                raise ValueError(f"{args.merge} is there already; choose another folder.")
            for folder, adapter in parts:
                merge(folder, adapter, os.path.join(args.merge, os.path.basename(adapter)))
            return

    context, pipes = multiprocessing.get_context("spawn"), []
    for agent in range(task.num_agents):
        ours, theirs = context.Pipe()
        context.Process(target=agent_process, daemon=True, args=(
            theirs, *parts[agent], agent, args.device, args.seed, config["max_new_tokens"], config["temperature"],
            config["top_p"])).start()
        theirs.close()  # so that an agent that dies is noticed
        pipes.append(ours)

    def heard(agent):
        try:
            said = pipes[agent].recv()
        except (EOFError, ConnectionError):  # the second one where it had not read what it was sent
            parser.exit(1, f"error: agent_{agent} stopped; what it said stands above.\n")
        if isinstance(said, ValueError):
            parser.exit(2, f"error: {said}\n")
        return said

    episode = Episode(item)
    for t in range(task.num_turns):
        for agent, pipe in enumerate(pipes):
            with contextlib.suppress(BrokenPipeError):  # it died; heard says so
                pipe.send(history(task, episode, agent))  # its own observations, nothing else
        responses = [heard(agent) for agent in range(task.num_agents)]
        episode.turns.append(Turn(None, None, None, responses, task.judge(item, responses, t, episode.world)))
        if episode.turns[-1].outcome.done:
            break
    for pipe in pipes:
        pipe.send(None)
    print(dialogue(task, episode, sys.stdout.isatty()))
    print(f"{item}: score {episode.turns[-1].outcome.score:.1f} after {len(episode.turns)} turns")


if __name__ == "__main__":
    main()
