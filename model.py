"""
The language model: one frozen base in memory, one LoRA adapter per agent (and critic), sampling and log-probabilities.

    LanguageModel.generate   samples for many histories at once, rows of different agents in one batch, with a KV cache
    LanguageModel.logprobs   log pi(a | h) of given answers, differentiable in the adapters' weights
    build_tiny               trains the base model "tiny": a 1M-parameter transformer, on a task's demonstrations
    init_distributed, ...    data-parallel training on several GPUs or machines

Shapes: B and R rows, T and N tokens, C hidden size, V vocabulary size, G answers per prompt, P prompt tokens, L slots
of the KV cache, Q queries, K keys, D head dimension.

    python model.py out/cc-strbuild --string CLIM      # run the trained team: one process per agent, no critic
    python model.py out/cc-strbuild --merge team       # team/agent_0, ...: plain models with merged adapters
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
import signal
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

from tasks import (TASK_OPTIONS, Episode, InputError, Turn, dialogue, exit_on_error, first_line, get_task, history,
                   write_text)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

# --- the tiny base ----------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
PLAIN_TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                  "{% if add_generation_prompt %}assistant:{% endif %}")
# the tiny base has learned the rules from its demonstrations, so its template omits the system message
TEMPLATE = ("{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def train_bpe(texts, pattern):
    """Byte-pair encoding of texts: {token bytes: rank}; ranks 0..255 are the single bytes.

    Each distinct word (a match of pattern) counts once, and merging continues until every word is a single token:
    train_bpe(["aab aab"], r"\\w+|\\s") adds b"aa" with rank 256 and b"aab" with rank 257.
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
    """A transformers tokenizer with train_bpe's ranks as its vocabulary, followed by the special tokens."""
    converter = TikTokenConverter(vocab_file=ranks, pattern=pattern, extra_special_tokens=special)
    converter.load_tiktoken_bpe = lambda ranks: ranks  # there is no file to read
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **options)


def tiny_tokenizer(task, rng):
    """A byte-level BPE trained on a task's own text, as a tiktoken.Encoding and as a transformers tokenizer."""
    texts = [message["content"] for _ in range(1500) for message in task.demonstration(rng) + task.exercise(rng)]
    ranks = train_bpe(texts, task.pattern)
    encoding = tiktoken.Encoding("tiny", pat_str=task.pattern, mergeable_ranks=ranks,
                                 special_tokens={token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)})
    return encoding, bpe_tokenizer(ranks, task.pattern, SPECIAL_TOKENS, pad_token="<|pad|>", eos_token="<|end|>",
                                   additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=TEMPLATE)


def build_tiny(task, folder, steps=None, lr=2e-3, width=160, layers=3, heads=5, seed=0):
    """Train the tiny base on task.demonstration and save it as an ordinary model folder; returns the folder.

    GPT-NeoX (Pythia's architecture), with a fused QKV projection and a plain MLP: its forward and backward were faster
    on a CPU than Llama's or GPT-2's. Weights are initialised with standard deviation width^-1/2: with the usual 0.02,
    attention in so narrow a model stays uniform for hundreds of steps. The folder appears only once it is complete.
    """
    warm_up = (steps := steps or task.base_steps) * 2 // 7  # learning-rate warm-up, on exercises only
    parent = os.path.dirname(folder) or "."
    with writing(folder):  # fail now, not after minutes of training
        os.makedirs(parent, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=".tiny-", dir=parent).cleanup()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    encoding, tokenizer = tiny_tokenizer(task, rng)
    pad, user, assistant, end = map(encoding.encode_single_token, SPECIAL_TOKENS)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=encoding.n_vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2048, use_parallel_residual=False, hidden_act="relu",
        tie_word_embeddings=True, initializer_range=width ** -0.5, bos_token_id=None, eos_token_id=end,
        pad_token_id=pad, rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    pool = []
    bar = tqdm(range(steps), desc=f"building {folder}", unit="step", dynamic_ncols=True)
    for step in bar:
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / max(1, warm_up), cosine)
        if not pool or step == warm_up:  # batches of conversations of similar length need little padding
            conversations = []
            for _ in range(task.base_batch * 16):
                ids, is_target = [], []  # 1 = in the loss: answers and the feedback on them
                for n, message in enumerate((
                        task.exercise if step < warm_up or rng.random() < 0.25 else task.demonstration)(rng)):
                    text = encoding.encode_ordinary(message["content"]) + [end]
                    ids += [user if message["role"] == "user" else assistant] + text
                    is_target += [0] + [int(n > 0)] * len(text)  # the item itself is random: nothing to learn there
                conversations.append((ids, is_target))
            conversations.sort(key=lambda conversation: len(conversation[0]))
            pool = [conversations[i:i + task.base_batch] for i in range(0, len(conversations), task.base_batch)]
            rng.shuffle(pool)
        batch = pool.pop()
        x = padded([ids for ids, _ in batch], pad, "cpu")  # (B, T)
        loss_mask = padded([mask for _, mask in batch], 0, "cpu")[:, 1:].bool()  # (B, T-1)
        hidden = model.base_model(input_ids=x, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, C)
        loss = F.cross_entropy(model.get_output_embeddings()(hidden[loss_mask]), x[:, 1:][loss_mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with writing(folder), tempfile.TemporaryDirectory(prefix=".tiny-", dir=parent) as build:
        model.save_pretrained(os.path.join(build, "model"))
        tokenizer.save_pretrained(os.path.join(build, "model"))
        if not os.path.isdir(folder):  # another run may have built it meanwhile: the first one counts
            os.rename(os.path.join(build, "model"), folder)
    return folder


@contextlib.contextmanager
def writing(path):
    """Turn any exception in the block into an OSError with one sentence (safetensors has its own for a full disk)."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


def load_tokenizer(name):
    """(tokenizer, whether its chat template supports the system role, id of the token that ends an answer).

    The end token is what the template puts after an answer: Gemma's is <end_of_turn>, though its eos_token is <eos>,
    and GLM's is the <|user|> of the next message. Models without a template, such as GPT-2, get a plain-text one and
    their eos_token. Raises InputError if there is none.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        bos = tokenizer.bos_token if tokenizer("").input_ids == [tokenizer.bos_token_id] else ""  # Llama, not GPT-2
        tokenizer.chat_template = bos + PLAIN_TEMPLATE
    chat = [{"role": role, "content": "\u00a7"} for role in ("system", "user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(chat[:2], tokenize=False)
        has_system_role = text.count("\u00a7") == 2 or tokenizer.chat_template == TEMPLATE
    except TemplateError:
        has_system_role = False
    special = {*tokenizer.all_special_ids, *(k for k, t in tokenizer.added_tokens_decoder.items() if t.special)}
    end = tokenizer.eos_token_id
    for messages in (chat[1:], chat[1:3]):  # the end of a final assistant message takes precedence
        after = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False).split("\u00a7")[2:3]
        ids = tokenizer("".join(after).lstrip(), add_special_tokens=False).input_ids[:1]
        end = ids[0] if ids and ids[0] in special else end
    if end is None:
        raise InputError(f"{name} has a tokenizer without an end token; answers could never end.")
    return tokenizer, has_system_role, end


def check_model(names, num_agents):
    """Before loading weights: InputError unless names is one model, or A,B,... with one per agent."""
    if names.count(",") not in (0, num_agents - 1):
        raise InputError(f"--model {names} names {names.count(',') + 1} models for {num_agents} agents.")
    for name in dict.fromkeys(names.split(",")):
        if name == "tiny":
            continue
        if not name:
            raise InputError(f"--model {names} has an empty name in its list.")
        if os.path.exists(name) and not os.path.isfile(os.path.join(name, "config.json")):
            raise InputError(f"{name} is not a model folder: it has no config.json.")
        if os.path.exists(name) and not any(file.endswith((".safetensors", ".bin")) for file in os.listdir(name)):
            raise InputError(f"{name} is not a model folder: it has no weights.")
        try:
            AutoConfig.from_pretrained(name)
            load_tokenizer(name)
        except Exception as error:  # a third-party chat template can fail in any way
            raise InputError(f"{name} is no model folder or id that can be loaded: {first_line(error)}") from None


def model_folders(names, task, build=True):
    """For each agent its folder or hub id; "tiny" is out/tiny-BASE, built if missing (InputError with build=False)."""
    folder = os.path.join("out", f"tiny-{task.base}")
    if "tiny" in names.split(",") and not os.path.isdir(folder):
        if not build:
            raise InputError(f"{folder} is not here; run this in the folder where the team was trained.")
        if not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0":
            build_tiny(task, folder)
    all_gather([])  # barrier: the other ranks wait for the build
    folders = [folder if name == "tiny" else name for name in names.split(",")]  # one for all agents, or one each
    return (folders * task.num_agents)[:task.num_agents]


def load_models(names, task, max_new_tokens, *options):
    """The LanguageModel of each agent; agents with the same folder share one object, so its weights are loaded once.

    Raises InputError if a folder cannot be loaded, if the model fails its self-test, or if the task's
    first prompts plus max_new_tokens exceed a model's context. Later prompts that are too long are truncated, and
    counted in .truncated.
    """
    folders = model_folders(names, task)
    bases = {folder: LanguageModel(folder, *options) for folder in dict.fromkeys(folders)}
    for agent, folder in enumerate(folders):
        for item in task.eval_items + task.train_items[:100]:
            prompt = len(bases[folder].render(history(task, Episode(item), agent)))
            if prompt + max_new_tokens > bases[folder].context:
                raise InputError(f"A prompt of {task.name} has {prompt} tokens; with {max_new_tokens} new ones it does "
                                 f"not fit into the {bases[folder].context} tokens that {folder} can read.")
    for base in bases.values():
        base.self_test()
    return [bases[folder] for folder in folders]


def load_state(path, device):
    """Load the train_state.pt that a train script saved; InputError if it cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=False)
    except Exception as error:  # a truncated pickle can raise anything
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None


def memory_gb(device):
    """Peak memory of this process so far in GiB: allocated GPU memory if device is a GPU, else resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


# --- several GPUs or machines -----------------------------------------------------------------------------------------


def init_distributed(device):
    """(rank, world size, device) under torchrun, where it joins the process group; otherwise (0, 1, device).

    Data parallelism: every rank draws the same random numbers and gets all episodes, but plays only its shard of them
    and computes the gradients of its shard of each minibatch. So N ranks with N x B episodes in total give the same
    update as one rank with all of them. Raises InputError if the device does not exist.
    """
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack some characters
    if device == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device != "cpu" and not (regex.fullmatch(r"cuda(:\d+)?", device) and
                                int(device[5:] or 0) < torch.cuda.device_count()):
        raise InputError(f"device must be cpu or an available cuda device, not {device}.")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, device
    set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device


def set_device(device):
    """Make cuda:N the current device: CUDA graphs, NCCL's object collectives and max_memory_allocated use that one."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def all_gather(items):
    """The concatenation of all ranks' lists, in rank order: [1] on rank 0 and [2, 3] on rank 1 give [1, 2, 3]."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for of_rank in lists for item in of_rank]


def micro_batches(episodes, input_ids, size):
    """This rank's shard of the episodes as micro-batches of at most `size` rows (episode, t); an empty shard has none.

    Turns are in reverse order, so that V(h_t+1) is known when the critic learns from h_t. Episodes are sorted by the
    token ids input_ids(turn) of their first turn, so that rows with a common prefix land in the same micro-batch, which
    computes that prefix once. With episodes a of two turns and b of one, size 2: [(a, 1), (a, 0)], [(b, 0)].
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    episodes = sorted(episodes, key=lambda e: input_ids(e.turns[0]))
    shard = episodes[len(episodes) * rank // ranks:len(episodes) * (rank + 1) // ranks]
    rows = [(e, t) for e in shard for t in reversed(range(len(e.turns)))]
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def optimizer_step(optimizer, parameters):
    """All-reduce (sum) the gradients, clip their global norm at 1 and step; returns the norm before clipping.

    A sum, because each rank's loss is already normalised by the row count of all ranks. Raises FloatingPointError with
    one sentence, before any weight has changed, if the norm is NaN or infinite.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])  # one all-reduce instead of one per tensor
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not norm < math.inf:
        raise FloatingPointError("a gradient is NaN or infinite; the last save is intact. Lower the learning rates "
                                 "and start again.")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# --- the base and its adapters ----------------------------------------------------------------------------------------


class Packed:
    """Token sequences packed into one row without padding, in which a prefix that several of them share occurs once.

    names: the adapter of each sequence; those of one adapter must be adjacent, and only they can share prefixes.
    [[1, 2, 3], [1, 2, 4]] become ids [1, 2, 3, 4] at positions [0, 1, 2, 2]; the paths [0, 1, 2] and [0, 1, 3] index
    the tokens of each. Turns of an episode share the first observation, answers of a group their prompt.
    first: index in each sequence from which on hidden states are output; [2, 1] gives the tokens wanted = [2, 1, 3].
    cached: for each sequence, the prompt whose keys and values precede this row in the KV cache (concatenated). Paths
    count those tokens first; ids holds only the new ones. A fully cached sequence computes its last token again.

    Attention is computed in blocks of queries of one sequence and the keys on the path up to them. The last layer skips
    queries whose output is not wanted.
    """
    BLOCK = 128  # queries per block at most; blocks with equally many key blocks share one attention call
    current = None  # the latest packed row; kept for the recomputation of gradient checkpointing
    MARKER = torch.zeros(1, 1, 1, 1)  # passed as attention_mask, it selects the attention of Packed.current

    def __init__(self, names, sequences, first, device, cached=None):
        ids, position, blocks = [], [], []  # blocks: (queries, keys)
        self.groups, self.paths, path, last = collections.Counter(), [None] * len(names), [], (None, [])
        cached = cached or [[]] * len(names)
        *offsets, past = itertools.accumulate(map(len, cached), initial=0)  # past: tokens in the KV cache
        for row in sorted(range(len(names)), key=lambda row: (names.index(names[row]), sequences[row])):
            name, sequence = names[row], list(sequences[row])
            shared = len(os.path.commonprefix([sequence, last[1]])) if name == last[0] else 0
            hit = len(os.path.commonprefix([sequence[:-1], list(cached[row])]))
            if hit > shared:
                shared, path = hit, range(offsets[row], offsets[row] + hit)
            new, last = len(sequence) - shared, (name, sequence)
            start = past + len(ids)
            self.paths[row] = path = [*path[:shared], *range(start, start + new)]
            self.groups[name] += new
            ids += sequence[shared:]
            position += range(shared, len(sequence))
            for start in range(shared, len(sequence), self.BLOCK):
                keys = path[:start + self.BLOCK]
                blocks.append(([token - past for token in keys[start:]], keys))
        self.ids, self.position = (long_tensor([numbers], device) for numbers in (ids, position))  # (1, N)
        wanted = [token - past for path, start in zip(self.paths, first) for token in path[start:]]
        self.wanted, wanted_set = long_tensor(wanted, device), set(wanted)
        self.plans = [self.plan(blocks), self.plan(  # for all layers but the last; for the last one
            [([token for token in queries if token in wanted_set], keys) for queries, keys in blocks])]

    def plan(self, blocks):
        """The batched attention calls, and for each of the N tokens its index in their outputs (0 if it has none)."""
        by_length, calls, offset, N = collections.defaultdict(list), [], 0, self.ids.shape[1]
        position = F.pad(self.position[0], (0, 1))  # (N + 1,); the last entry is that of padding
        out_index = torch.zeros_like(position)
        for queries, keys in blocks:
            if queries:
                by_length[-(-len(keys) // self.BLOCK)].append((queries, keys))
        for call in by_length.values():
            queries = padded([queries for queries, _ in call], N, self.ids.device)  # (n, Q)
            keys = padded([keys for _, keys in call], 0, self.ids.device)  # (n, K)
            out_index[queries] = torch.arange(offset, offset + queries.numel(), device=queries.device).view_as(queries)
            offset += queries.numel()
            calls.append((queries.clamp(max=N - 1), position[queries], keys, {}))  # {}: sliding window -> its mask
        return calls, out_index[:N]

    @staticmethod
    def mask(query_position, keys, window, dtype):
        """Additive mask (n, 1, Q, K): -inf for keys after a query (causal) or outside its sliding window."""
        query_position, key_position = query_position[:, :, None], torch.arange(keys.shape[1], device=keys.device)
        masked = key_position > query_position  # (n, Q, K)
        if window:
            masked |= key_position <= query_position - window
        return torch.zeros(masked.shape, dtype=dtype, device=keys.device).masked_fill_(masked, -math.inf)[:, None]

    @staticmethod
    def attention(module, query, key, value, attention_mask, sliding_window=None, **options):
        """transformers' attention interface: an in-place decode step, plain SDPA, or the packed row (MARKER)."""
        if getattr(module, "in_place_kv", None):
            return in_place_attention(module, query, key, value, attention_mask, sliding_window, **options)
        if attention_mask is None or attention_mask.data_ptr() != Packed.MARKER.data_ptr():  # some models slice it
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        (calls, out_index), outputs = Packed.current.plans[module is Packed.current.last], []
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N or past + N, heads, D)
        for queries, query_position, keys, masks in calls:
            q, k, v = (x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
                       for x, index in ((query, queries), (key, keys), (value, keys)))  # (n, heads, Q or K, D)
            if sliding_window not in masks:
                masks[sliding_window] = Packed.mask(query_position, keys, sliding_window, q.dtype)
            out, _ = sdpa_attention_forward(module, q, k, v, masks[sliding_window], **options | {"is_causal": False})
            outputs.append(out.flatten(0, 1))  # (n x Q, heads, D)
        return torch.cat(outputs).index_select(0, out_index)[None], None  # (1, N, heads, D)


def in_place_attention(module, query, key, value, attention_mask, sliding_window, scaling=None, **_):
    """Decode-step attention that writes the new keys and values into the KV cache in place (see sample_in_place).

    module.in_place_kv: keys and values (R, KV heads, L, D) and the slots (G,) of the new ones (R, KV heads, G, D);
    attention_mask: (R, 1, G, K), additive. Query heads that share a KV head become queries of it: no key is repeated.
    """
    keys, values, cache_position = module.in_place_kv
    keys.index_copy_(2, cache_position, key)
    values.index_copy_(2, cache_position, value)
    keys, values = (x[:, :, :attention_mask.shape[-1]] for x in (keys, values))
    if sliding_window:
        outside = torch.arange(keys.shape[2], device=keys.device) <= cache_position[-1] - sliding_window
        attention_mask = attention_mask.masked_fill(outside, -math.inf)
    (R, heads, G, D), n_rep = query.shape, query.shape[1] // keys.shape[1]  # n_rep: query heads per KV head
    mask = attention_mask.expand(-1, n_rep, -1, -1).reshape(R, 1, n_rep * G, -1)
    out = F.scaled_dot_product_attention(query.reshape(R, -1, n_rep * G, D), keys, values, mask, scale=scaling)
    return out.reshape(R, heads, G, D).transpose(1, 2).contiguous(), None


AttentionInterface.register("packed", Packed.attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def jit_trace(step, state, lora):
    """step traced to TorchScript, which runs without Python; step itself if its control flow depends on data.

    state: its first arguments, which it changes in place (a copy is traced). lora: the others, tensors that the layers
    hold: as arguments they are inputs of the trace, wherever step gets them from; otherwise they would be constants.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torch.compile, which takes minutes on a CPU
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.TracerWarning.ignore_lib_warnings()  # those from PyTorch's own code are harmless
        try:
            return torch.jit.trace(step, (*(x.clone() for x in state), *lora), check_trace=False)
        except Exception:  # whatever the model's code makes tracing raise; a real error recurs when step runs
            return step


def round_up(slots):
    """slots, rounded up to a multiple of 8: kernels want aligned key lengths and rows."""
    return -(-slots // 8) * 8


def long_tensor(rows, device):
    """torch.tensor of equally long lists of integers, by way of numpy: ten times as fast, and there are many."""
    return torch.from_numpy(np.array(rows, dtype=np.int64)).to(device)


def padded(rows, pad_value, device, left=False):
    """Lists padded to one tensor: [[1, 2], [3]] and pad_value 0 give [[1, 2], [3, 0]]; left-padded, [0, 3]."""
    length = max(map(len, rows))
    padding = [[pad_value] * (length - len(row)) for row in rows]
    return long_tensor([pad + list(row) if left else list(row) + pad for pad, row in zip(padding, rows)], device)


def sample(logits, uniforms, temperature, top_p):
    """Tokens and log-probabilities (.., G) for logits (.., G, V) and one random number in [0, 1) for each, (.., G)."""
    logp = (logits.float() / temperature).log_softmax(-1)
    probs = logp.exp()
    if top_p < 1:  # nucleus: the fewest most likely tokens whose probabilities exceed top_p
        ordered, order = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    cdf = probs.cumsum(-1)  # inverse transform sampling: one random number per token, not V
    token = torch.searchsorted(cdf, uniforms[..., None] * cdf[..., -1:], right=True).clamp(max=logp.shape[-1] - 1)
    return token[..., 0], logp.gather(-1, token)[..., 0]


class MergedLinear(torch.autograd.Function):
    """x (W + B^T A)^T + bias, split into the outputs of siblings, where W is cheap to copy: A and B as in lora_forward.

    Adding them to W saves (x A^T) B and its part of x's gradient. Their own gradients still go through rank r; x A^T is
    recomputed in backward.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, sizes):
        merged = torch.addmm(W, B.t(), A)
        ctx.save_for_backward(x, merged, A, B)
        return F.linear(x, merged, bias).unsafe_split_with_sizes(sizes, -1)

    @staticmethod
    def backward(ctx, *grads):
        x, merged, A, B = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]  # (B T, inputs), (B T, outputs)
        grad_x, grad_A, grad_B = None, torch.empty_like(A), torch.empty_like(B)  # of B only the diagonal blocks
        low_rank, start, rank = F.linear(rows, A).t(), 0, len(A) // len(grads)
        for k, grad in enumerate(grads):
            own, outputs = slice(k * rank, (k + 1) * rank), slice(start, start := start + grad.shape[1])
            if ctx.needs_input_grad[0]:
                grad_x = grad @ merged[outputs] if grad_x is None else grad_x.addmm_(grad, merged[outputs])
            grad_A[own] = (grad @ B[own, outputs].t()).t() @ rows
            grad_B[own, outputs] = low_rank[own] @ grad
        return None if grad_x is None else grad_x.view_as(x), None, None, grad_A, grad_B, None


def lora_forward(layer, x):
    """y = x W^T + scale (x A^T) B^T, where every row of x has its own adapter's A and B; x: (B, T, inputs).

    PEFT can mix adapters in a batch too (adapter_names), but only for inference and with a lookup by name in every
    layer. Here the A of all n adapters are stacked, times their scale, and of x A^T each row keeps the part of its own
    adapter; B is stacked alike, transposed. Siblings (layers with the same input x, such as query, key and value) are
    one layer with a block-diagonal B: the first computes the outputs of all. Without gradients A is a part of W, which
    saves a product. Where W is cheap to copy, a single adapter is added to it, with gradients (MergedLinear) and
    without; so are several, each to its own copy, if they have equally many rows and no gradients are needed.
    """
    if layer.stacked_lora is None:
        return layer.base_layer(x)
    if layer.stacked_lora:
        W, bias, A, B, row_mask, sizes, merge = layer.stacked_lora
        if B is None:  # merged already: W is (n, outputs, inputs)
            bias = W.new_zeros(1) if bias is None else bias
            y = torch.baddbmm(bias, x.reshape(W.shape[0], -1, W.shape[2]), W.mT).view(*x.shape[:-1], -1)
            layer.shared[:] = y.split(sizes, -1)
        elif merge:
            layer.shared[:] = MergedLinear.apply(x, W, bias, A, B, sizes)
        else:
            rows, (width, outputs) = x.flatten(0, -2), B.shape
            y = F.linear(rows, W, bias)  # (B T, outputs [+ n x siblings x rank])
            y, low_rank = (y[:, :outputs], y[:, outputs:outputs + width]) if A is None else (y, F.linear(rows, A))
            if row_mask is not None:  # OPT's MLP reads (B T, inputs)
                low_rank = (low_rank.view(row_mask.shape[0], -1, row_mask.shape[2]) * row_mask).flatten(0, 1)
            y = y.addmm_(low_rank, B).view(*x.shape[:-1], -1)
            # "unsafe", because a model may change its part in place, which autograd forbids for those of split
            layer.shared[:] = y.unsafe_split_with_sizes(sizes, -1) if len(sizes) > 1 else [y]
    return layer.shared.pop(0)


def join_weights(layers):
    """(W, bias or None, sizes) of siblings as one layer. W ends with rows for their A, the last of the sizes.

    Each W becomes a view of the joined one, so the weights are in memory once (twice if two layers had shared them).
    """
    weights = [layer.base_layer.weight.T if layer.fan_in_fan_out else layer.base_layer.weight for layer in layers]
    sizes = [*map(len, weights), round_up(len(layers) * sum(layers[0].r.values()))]
    W = torch.cat([*weights, weights[0].new_zeros(sizes[-1], weights[0].shape[1])])
    for layer, view in zip(layers, W.split(sizes)):
        layer.base_layer.weight = torch.nn.Parameter(view.T if layer.fan_in_fan_out else view, requires_grad=False)
    biases = [layer.base_layer.bias for layer in layers] + [None]
    if any(bias is not None for bias in biases):
        return W, torch.cat([W.new_zeros(n) if bias is None else bias for bias, n in zip(biases, sizes)]), sizes
    return W, None, sizes


def rms_norm_forward(norm, x):
    """transformers' RMSNorm, on a GPU in one kernel instead of eight; in bf16 it rounds once instead of twice."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def fuse_rms_norms(causal_lm):
    """Let the model's RMSNorms use rms_norm_forward, except those that compute something else."""
    for norm in causal_lm.modules():
        if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            x = torch.randn(2, *norm.weight.shape).to(norm.weight)
            if x.dtype == causal_lm.dtype and torch.allclose(norm(x), rms_norm_forward(norm, x), rtol=0.02):
                norm.forward = types.MethodType(rms_norm_forward, norm)


class LanguageModel:
    """A frozen causal LM and its tokenizer, with any number of LoRA adapters.

    generate, hidden and logprobs take `names`, the adapter of each row (PEFT's adapter_names), or all None for the base
    alone; rows of one adapter must be adjacent. The same numbers are computed in whichever way is fastest:

        prefill; updates on a CPU               Packed: one row without padding, shared prefixes once
        updates on a GPU                        padded rows, which flash attention reads faster
        decoding                                sample_in_place: KV cache updated in place; a CUDA graph or traced steps
        a small base in float32                 adapters merged into copies of W (lora_forward)
        several answers to one prompt           one row of the batch, which decodes a token of each per step
        models that cannot pack (can_pack)      sample_dynamic: padded rows, transformers' own masks and DynamicCache
    """

    def __init__(self, folder, device="cpu", rank=16, attn=None, gradient_checkpointing=False, compiled=False):
        self.folder, self.device, self.rank, self.peft = folder, device, rank, None
        set_device(device)
        try:
            self.tokenizer, self.has_system_role, self.end = load_tokenizer(folder)
            self.causal_lm = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32, attn_implementation=attn)
            config = self.causal_lm.config.get_text_config()
            # layers with a state instead of keys and values (Qwen3.5, LFM2): no prefix can be shared
            self.stateful = any(hasattr(layer, "update_conv_state") for layer in DynamicCache(config=config).layers)
        except Exception as error:  # third-party weights can fail in any way
            raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from None
        self.causal_lm.to(device).eval().requires_grad_(False)
        if device.startswith("cuda"):
            fuse_rms_norms(self.causal_lm)
        self.hidden_size = self.causal_lm.get_input_embeddings().weight.shape[1]
        self.pad = self.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id  # masked everywhere
        context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's
        self.context = context or 10 ** 9
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # beyond this, frequencies change for all rows but not for cached keys
            self.context = min(self.context, rope.get("original_max_position_embeddings", self.context))
        if rope.get("rope_type") in ("dynamic", "longrope"):  # within the context frequencies are constant;
            for module in self.causal_lm.modules():  # the check synchronises the GPU, which no CUDA graph allows
                if hasattr(module, "rope_type"):
                    module.rope_type = "default"
        self.truncated = 0  # prompts that were truncated on the left to fit into the context
        divisor, factor, multiplier, self.softcap = (getattr(config, name, None) for name in (
            "logits_scaling", "logit_scale", "lm_head_multiplier", "final_logit_softcapping"))
        self.logit_scale = (factor or 1.0) * (multiplier or 1.0) / (divisor or 1.0)  # Granite, Cohere, Falcon; Gemma 2
        self.siblings = []  # lists of LoRA layers with the same input
        params = list(self.causal_lm.parameters())
        self.can_merge = sum(p.numel() for p in params) < 2e7 and params[0].dtype == torch.float32  # W is cheap to copy
        probe = torch.cat([p.flatten()[:64] for p in params])
        # as bf16: the same for any dtype the base is loaded in
        self.fingerprint = zlib.crc32(probe.bfloat16().cpu().view(torch.int16).numpy().tobytes())
        self.set_rows([None])  # no adapter by default
        self.attention_layers = [m for m in self.causal_lm.modules() if getattr(m, "layer_idx", None) is not None]
        # a sliding window that only the mask implements (PhiMoE)
        masked_window = getattr(config, "sliding_window", None) and not any(
            "sliding_window=" in inspect.getsource(type(m).forward) for m in self.attention_layers)
        # models whose attention function can be replaced read packed rows
        self.can_pack = config._attn_implementation == "sdpa" and self.causal_lm._supports_attention_backend and not (
            self.stateful or masked_window or any(getattr(config, name, None) for name in (
                # Llama 4 attends in chunks, DeepSeek compresses keys and values, Gemma 3n shares them between layers
                "attention_chunk_size", "kv_lora_rank", "num_kv_shared_layers")))
        self.can_share_prompts = self.can_pack and not getattr(config, "sliding_window", None)
        if self.can_pack:
            self.causal_lm.set_attn_implementation("packed")
        self.static_cache = device.startswith("cuda") or compiled  # full length from the start, no row is dropped
        self.traced_steps = {}  # decode steps as TorchScript
        layers = max((m for m in self.causal_lm.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        self.compiled = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers if compiled]
        # the last layer computes only the outputs that are wanted
        self.last_attention = next((m for m in layers[-1].children() if m in self.attention_layers), None)
        mlp = getattr(layers[-1], "mlp", None)
        if mlp is not None and len(inspect.signature(mlp.forward).parameters) == 1 and not any(
                "expert" in key or "router" in key for key, _ in mlp.named_parameters()):
            self.full_mlp_forward, mlp.forward = mlp.forward, self.last_mlp_forward
        self.target_modules = "all-linear"
        if any("expert" in key for key, _ in self.causal_lm.named_parameters()):  # mixture of experts: attention only
            self.target_modules = [key for key, m in self.causal_lm.named_modules()
                                   if isinstance(m, torch.nn.Linear) and "att" in key]
        if gradient_checkpointing:
            found = [m for m in self.causal_lm.modules() if isinstance(m, GradientCheckpointingLayer)]
            if not found:
                raise InputError(f"{folder} is of a model type without gradient checkpointing.")
            for module in found:  # transformers' own works only in training mode, where dropout is active
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False,
                                                   preserve_rng_state=False)

    def add_adapter(self, name, folder=None):
        """Add a new LoRA adapter, or load a saved one (as the model's first only); returns its parameters (fp32).

        Raises InputError if the adapter in folder was trained on another base.
        """
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=self.target_modules,
                            task_type="CAUSAL_LM")
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
        for layer in self.lora_layers():
            layer.scale, layer.stacked_lora = layer.scaling[name], None  # the scale is the same for all
            # torch.compile reuses a bound method's code for all layers but recompiles a partial for each (8 at most)
            layer.forward = types.MethodType(lora_forward, layer)
        self.siblings = self.siblings or self.find_siblings()
        for layers in self.siblings:
            layers[0].joined = join_weights(layers)
        torch.cuda.empty_cache()  # give back the memory of the separate W: a capture of a CUDA graph could not claim it
        return parameters

    @torch.no_grad()
    def find_siblings(self):
        """Lists of LoRA layers that read the same input tensor, in execution order; other layers are lists of one."""
        readers = collections.defaultdict(list)
        hooks = [layer.register_forward_pre_hook(lambda layer, inputs: readers[inputs[0]].append(layer))
                 for layer in self.lora_layers()]
        self.set_rows([None], long_tensor([1], self.device))  # fewer tokens for the last MLP than for the attention
        self.causal_lm(input_ids=long_tensor([[self.end] * 2], self.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        found = list(readers.values())
        found += [[layer] for layer in self.lora_layers() if not any(layer in layers for layers in found)]
        for layers in found:
            shared = []
            for layer in layers:
                layer.shared = shared
        return found

    def check_base(self, folder):
        """Raise InputError if the adapter in folder was saved with another base (by fingerprint)."""
        path = os.path.join(folder, "base.json")
        if os.path.exists(path):
            try:
                with open(path) as file:
                    base = json.load(file)
            except ValueError as error:
                raise InputError(f"{path} cannot be read: {first_line(error)}") from None
            if base["fingerprint"] != self.fingerprint:
                raise InputError(f"{folder} was trained on another base: {base['model']} as it was then, not "
                                 f"{self.folder} as it is now.")

    def self_test(self):
        """Raise InputError unless sampling, updates and PEFT's own forward agree on log-probabilities.

        An unusual architecture (a layer before the LM head, its own kind of attention, ...) may break an assumption of
        the fast paths, which would then silently compute wrong numbers.
        """
        compiled, self.compiled = self.compiled, []  # compiling would take longer than the whole test
        names, prompt_cache, uniforms = ["check_0"] * 2 + ["check_1"] * 2, {}, torch.rand(4, 3)
        prompts = [self.render([{"role": "user", "content": text}]) for text in ["one"] * 2 + ["one two three"] * 2]
        try:
            for name in names[::2]:
                for p in self.add_adapter(name):
                    torch.nn.init.normal_(p, std=0.02)
            end, self.end = self.end, -1  # answers must not end early
            for turn in range(2):
                tokens, sampled = self.generate(names, prompts, uniforms, 1.0, 1.0, range(4), prompt_cache)
                recomputed, _ = self.logprobs(names, prompts, tokens)
                recomputed.sum().backward()
                plain, forwards = [], [vars(layer).pop("forward") for layer in self.lora_layers()]  # now PEFT's own
                for name, prompt, answer in zip(names, prompts, tokens):
                    self.set_rows([name])
                    self.peft.set_adapter(name)
                    with torch.no_grad():
                        ids = long_tensor([prompt + answer], self.device)
                        logits = self.causal_lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1]
                    plain.append(logits.float().log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0])
                for layer, forward in zip(self.lora_layers(), forwards):
                    layer.forward = forward
                plain, sampled = torch.cat(plain), torch.tensor(sum(sampled, []), device=self.device)
                error = (torch.stack([sampled, recomputed]) - plain).abs().mean(1).max().item()  # NaN if any is
                if not error < (0.01 if self.causal_lm.dtype == torch.float32 else 0.2):
                    raise ArithmeticError(f"log-probabilities differ by {error:.2g}")
                prompts = [prompt + answer + [end] for prompt, answer in zip(prompts, tokens)]
        except Exception as error:  # an unsupported model can fail in any way
            raise InputError(f"{self.folder}, a model of type {self.causal_lm.config.model_type}, does not work here: "
                             f"{first_line(error)}") from None
        for layers in self.siblings:  # LoRA layers refer to themselves: their memory would wait for garbage collection
            layers[0].joined = layers[0].stacked_lora = None
        self.peft.unload()
        self.peft, self.siblings, self.traced_steps, self.compiled, self.end = None, [], {}, compiled, end

    def lora_layers(self):
        return [module for module in self.causal_lm.modules() if isinstance(module, LoraLayer)]

    def set_rows(self, names, wanted=None):
        """Set the adapter of each row (or token of a packed row) of the following forwards; all None: the base alone.

        wanted: indices into the flattened tokens of all rows whose hidden states are output, or None for all. Both stay
        set until the next call, because gradient checkpointing repeats forwards. Without gradients A is written into W,
        so a backward must come before that. Returns the tensors that lora_forward will use, in the layers' order.
        """
        self.groups = groups = [(name, len(list(rows))) for name, rows in itertools.groupby(names)]
        self.wanted, dtype = wanted, self.causal_lm.dtype
        names = [name for name, _ in groups if name is not None]
        equal = len({rows for _, rows in groups}) == 1  # whether all adapters have as many rows

        def join(how, weights):  # what is alone need not be copied
            return how(weights) if len(weights) > 1 else weights[0]

        def block_diag(blocks):
            return torch.block_diag(*blocks)

        @functools.cache
        def row_mask(width):  # (rows or tokens, 1, n x width), 1 = the row's own adapter; None if there is one for all
            blocks = [torch.ones(rows, width) for _, rows in groups]
            return torch.block_diag(*blocks).to(self.device, dtype)[:, None] if len(groups) > 1 else None

        tensors = []
        for layers in self.siblings:
            for layer in layers:
                layer.stacked_lora = () if names else None
            if not names:
                continue
            # in the base's dtype, or autograd would save an fp32 copy of every input
            A = join(torch.cat, [layer.lora_A[name].weight for name in names for layer in layers]).to(dtype)
            A = A * layers[0].scale  # (n x siblings x rank, inputs)
            B = [join(block_diag, [layer.lora_B[name].weight.to(dtype).t() for layer in layers]) for name in names]
            B = join(torch.cat, B)  # (n x siblings x rank, outputs)
            W, bias, sizes = layers[0].joined
            n, merge = sum(sizes[:-1]), False
            if torch.is_grad_enabled():
                W, merge = W[:n], self.can_merge and len(names) == 1
            elif equal and self.can_merge:
                A, B = (x.unflatten(0, (len(names), -1)) for x in (A, B))
                W, A, B = torch.baddbmm(W[:n], B.mT, A), None, None  # (n, outputs, inputs)
            else:
                W[n:n + len(A)] = A
                W, A = W[:n + round_up(len(A))], None
            bias = None if bias is None else bias[:W.shape[-2]]
            mask = None if B is None else row_mask(len(B) // len(names))
            layers[0].stacked_lora = W, bias, A, B, mask, sizes[:-1], merge
            tensors += filter(torch.is_tensor, layers[0].stacked_lora)
        return tensors

    def render(self, messages, new_tokens=None):
        """Token ids of a history in the model's chat template, with the generation prompt; thinking is disabled.

        With new_tokens, a prompt that leaves no room for so many is truncated on the left, and counted.
        """
        if messages[0]["role"] == "system" and not self.has_system_role:
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
        """Texts of B lists of token ids, without special tokens."""
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    @torch.inference_mode()
    def generate(self, names, prompts, uniforms, temperature=1.0, top_p=1.0, row_ids=(), prompt_cache=None):
        """Sample one answer per row: (tokens, logps), two lists of B lists of equal lengths.

        prompts: B lists of token ids; uniforms: (B, max_new_tokens) random numbers in [0, 1), one per sampled token, so
        that an answer does not depend on the other rows of the batch. Answers end with the end token unless they were
        cut at max_new_tokens. logps are those of the softmax at `temperature`, before top_p truncates it.

        prompt_cache: a dict from row ids (any hashables) to the first prompt of that row with its keys and values,
        filled here; a later prompt with the same row id, such as the next turn's, reuses their common prefix.
        """
        uniforms, prompt_cache = uniforms.to(self.device), {} if prompt_cache is None else prompt_cache
        # G answers to one prompt are one row of the batch that decodes G tokens per step: its KV cache is read once
        run_lengths = [len(list(run)) for _, run in itertools.groupby(zip(names, prompts))]
        G = math.gcd(*run_lengths) if self.can_share_prompts else 1
        names, prompts = names[::G], prompts[::G]
        mask = padded([[1] * len(p) for p in prompts], 0, self.device, left=True).bool()  # (B / G, P), 1 = not padding
        tokens = torch.full(uniforms.shape, -1, device=self.device)  # -1 = not sampled
        logps = torch.zeros(uniforms.shape, device=self.device)
        if self.can_pack:
            num_slots = round_up(mask.shape[1] + G * min(uniforms.shape[1], math.inf if self.static_cache else 64))
            row_ids = [row_ids[k:k + G] for k in range(0, len(row_ids), G)]  # for each prompt those of its G answers
            logits, kv_cache = self.prefill(names, prompts, row_ids, prompt_cache, num_slots)  # (B / G, V)
            logits = logits[:, None].expand(-1, G, -1)
            ids, logp = sample(logits, uniforms[:, 0].view(-1, G), temperature, top_p)  # (B / G, G)
            tokens[:, 0], logps[:, 0] = ids.flatten(), logp.flatten()
            self.sample_in_place(names, kv_cache, mask, ids, uniforms, tokens, logps, temperature, top_p)
        else:
            self.sample_dynamic(names, prompts, mask, uniforms, tokens, logps, temperature, top_p)
        lengths = (tokens >= 0).sum(1).tolist()
        return tuple([row[:n] for row, n in zip(rows.tolist(), lengths)] for rows in (tokens, logps))

    def sample_dynamic(self, names, prompts, mask, uniforms, tokens, logps, temperature, top_p):
        """Sample with transformers' own masks and DynamicCache, for models that cannot pack."""
        self.set_rows(names)
        cache = DynamicCache(config=self.causal_lm.config) if self.stateful else DynamicCache()
        ids = padded(prompts, self.pad, self.device, left=True)  # (B, P), then (B, 1)
        position = (mask.long().cumsum(1) - 1).clamp(min=0)
        alive = torch.ones_like(ids[:, :1], dtype=torch.bool)  # (B, 1), 1 = has not ended
        for t in range(uniforms.shape[1]):
            logits = self.causal_lm(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                                    logits_to_keep=1).logits
            ids, logp = sample(logits[:, -1:], uniforms[:, t:t + 1], temperature, top_p)
            tokens[:, t:t + 1], logps[:, t:t + 1] = torch.where(alive, ids, -1), torch.where(alive, logp, 0.0)
            alive &= ids != self.end
            if not alive.any():
                break
            position, mask = position[:, -1:] + 1, F.pad(mask, (0, 1), value=True)

    def sample_in_place(self, names, kv_cache, mask, ids, uniforms, tokens, logps, temperature, top_p):
        """Sample from the second token on; a step updates its tensors in place, so that it can be replayed.

        Launching hundreds of small kernels per token from Python takes longer than running them. On a GPU a CUDA graph
        launches them at once; finished rows stay in the batch, because the weights are read once for all rows. On a CPU
        finished rows are dropped, and a step is traced once for all calls of its kind, so that it runs without Python.
        kv_cache: see prefill; mask: (R, P); ids: (R, G); uniforms, tokens, logps: (R x G, max_new_tokens).
        """
        lora = self.set_rows(names)
        (R, G), P, T, device = ids.shape, mask.shape[1], uniforms.shape[1], ids.device
        L = round_up(P + G * T)
        slots, cache_position = torch.arange(L, device=device), torch.arange(P, P + G, device=device)
        own = torch.arange(L - P, device=device) % G == torch.arange(G, device=device)[:, None]
        visible = torch.cat([mask[:, None].expand(-1, G, -1), own.expand(R, -1, -1)], 2)  # (R, G, L): prompt and own
        answer = torch.arange(R * G, device=device).view(R, G)  # index of each answer in tokens and logps
        last = (mask.sum(1, keepdim=True) - 1).expand(-1, G)  # position of each prompt's last token
        t, alive = torch.ones(1, dtype=torch.long, device=device), ids != self.end  # (R, G), 1 = has not ended

        def step(slots, t, cache_position, uniforms, tokens, logps, answer, ids, last, alive, visible, *kv_and_lora):
            for module in self.attention_layers:
                module.in_place_kv = *kv_and_lora[2 * module.layer_idx:][:2], cache_position
            attend = visible[:, :, :slots.shape[0]] & (slots <= cache_position[-1])
            # additive here, or every layer would convert the boolean mask again
            attention_mask = torch.zeros_like(attend, dtype=self.causal_lm.dtype).masked_fill_(~attend, -math.inf)
            logits = self.causal_lm(input_ids=ids, attention_mask=attention_mask[:, None], position_ids=last + t,
                                    use_cache=False, logits_to_keep=G).logits
            token, logp = sample(logits, uniforms[answer, t], temperature, top_p)
            # tokens[...] = would make the sizes constants of the trace if there is a single row
            tokens.index_put_((answer, t), torch.where(alive, token, -1))
            logps.index_put_((answer, t), torch.where(alive, logp, 0.0))
            ids.copy_(token)
            alive.logical_and_(token != self.end)
            cache_position.add_(G)
            t.add_(1)
            for module in self.attention_layers:
                module.in_place_kv = None
            return alive

        eager_forwards = [layer.forward for layer, _ in self.compiled]
        for layer, forward in self.compiled:
            layer.forward = forward
        run_step = step
        for k in range(1, T):
            if not self.static_cache or k % 16 == 1:  # the check synchronises the GPU
                unfinished = alive.any(1)
                if not unfinished.any():
                    break
                if not self.static_cache and unfinished.float().mean() < 0.7:  # copying for every single row costs more
                    keep = unfinished.nonzero()[:, 0]
                    answer, ids, last, alive, visible, *kv_cache = (
                        x.index_select(0, keep) for x in (answer, ids, last, alive, visible, *kv_cache))
                    names = [names[row] for row in keep.tolist()]
                    lora = self.set_rows(names)
            K = L if self.static_cache else round_up(P + G * k)
            if kv_cache[0].shape[2] < K:
                kv_cache = [F.pad(x, (0, 0, 0, min(L, K + 64 * G) - x.shape[2])) for x in kv_cache]
            state = slots[:K], t, cache_position, uniforms, tokens, logps, answer, ids, last, alive, visible, *kv_cache
            if lora and not self.static_cache:  # a trace without adapters would keep the base's W as constants
                constants = G, len(lora), temperature, top_p  # len tells merged, single and masked adapters apart
                if constants not in self.traced_steps:
                    self.traced_steps[constants] = jit_trace(step, state, lora)
                run_step = self.traced_steps[constants]
            run_step(*state, *lora)
            if k == 1 and ids.is_cuda:  # the first step, outside the graph, was also the warm-up
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(*state, *lora)
                run_step = lambda *_: graph.replay()
        for (layer, _), forward in zip(self.compiled, eager_forwards):
            layer.forward = forward

    def prefill(self, names, prompts, row_ids, prompt_cache, num_slots):
        """Prefill B prompts of at most P tokens: next-token logits (B, V), and the KV cache.

        The cache is a list with two tensors (B, KV heads, num_slots, D) per layer, keys and values; prompts are
        left-padded to P, further slots are free. row_ids: for each prompt the row ids of its answers in prompt_cache.
        """
        B, P, logits, kv_cache = len(prompts), max(map(len, prompts)), [], []
        for k in range(0, B, 16):  # the activations of 16 prompts fit into a CPU's caches
            chunk, past = prompts[k:k + 16], DynamicCache()
            cached = [prompt_cache.get(same[0], ([], [])) for same in row_ids[k:k + 16]]  # (prompt, keys and values)
            past_kv = [torch.cat(x, 1)[None] for x in zip(*(kv for _, kv in cached if kv))]
            for layer, pair in enumerate(zip(past_kv[::2], past_kv[1::2])):
                past.update(*pair, layer)
            row, inputs = self.pack(names[k:k + 16], chunk, [len(p) - 1 for p in chunk], [p for p, _ in cached])
            logits.append(self.causal_lm(**inputs, past_key_values=past, logits_to_keep=row.wanted).logits[0])
            paths = padded(row.paths, 0, self.device, left=True)  # (rows, longest)
            packed_kv = [x[0] for layer in past.layers for x in (layer.keys, layer.values)]  # (KV heads, tokens, D)
            kv_cache = kv_cache or [x.new_zeros(B, x.shape[0], num_slots, x.shape[2]) for x in packed_kv]
            for x, out in zip(packed_kv, kv_cache):
                x = x.index_select(1, paths.flatten()).unflatten(1, paths.shape).transpose(0, 1)
                out[k:k + 16, :, P - paths.shape[1]:P] = x
            for b, (same, prompt) in enumerate(zip(row_ids[k:k + 16], chunk), k):
                if new := [row_id for row_id in same if row_id not in prompt_cache]:
                    own = [x[b, :, P - len(prompt):P].clone() for x in kv_cache]  # without padding and free slots
                    prompt_cache.update(dict.fromkeys(new, (prompt, own)))
        return torch.cat(logits), kv_cache

    def pack(self, names, sequences, first, cached=None):
        """Pack these sequences as Packed.current; returns it and the model inputs that select it."""
        Packed.current = row = Packed(names, sequences, first, self.device, cached)
        row.last = self.last_attention
        self.set_rows(row.groups.elements(), row.wanted.unique())
        return row, {"input_ids": row.ids, "position_ids": row.position, "attention_mask": Packed.MARKER}

    def last_mlp_forward(self, x):
        """The last layer's MLP for the wanted tokens only, 0 for the others: no later layer reads those."""
        if self.wanted is None or len(self.groups) > 1:
            return self.full_mlp_forward(x)
        out = self.full_mlp_forward(x.flatten(0, 1)[self.wanted][None])[0]  # (N, C)
        return torch.zeros_like(x).flatten(0, 1).index_copy(0, self.wanted, out).view_as(x)

    def hidden(self, names, sequences, first):
        """Last-layer hidden states (N, C) of B token-id lists, concatenated, from position first[b] to the end of each.

        Where sequences are not packed, rows are right-padded, so that causal attention needs no padding mask.
        """
        if self.can_pack and self.device == "cpu":  # on a GPU flash attention of padded rows is faster
            row, inputs = self.pack(names, sequences, first)
            wanted = row.wanted  # (N,); sequences with a common prefix may want the same token
        else:
            inputs = {"input_ids": padded(sequences, self.pad, self.device)}  # (B, T)
            T = inputs["input_ids"].shape[1]
            wanted = long_tensor([b * T + t for b, (s, start) in enumerate(zip(sequences, first))
                                  for t in range(start, len(s))], self.device)
            self.set_rows(names, wanted)
        states = self.causal_lm.base_model(**inputs, use_cache=False).last_hidden_state  # (1 or B, T, C)
        return states.flatten(0, 1)[wanted]

    def logprobs(self, names, prompts, tokens, temperature=1.0):
        """log pi of every sampled token and the policy's entropy there, in nats; both (N,), answers concatenated.

        Vocabulary logits are computed only at the positions that predict an answer's tokens.
        """
        hidden = self.hidden(names, [p + t[:-1] for p, t in zip(prompts, tokens)], [len(p) - 1 for p in prompts])
        sampled = long_tensor([token for t in tokens for token in t], self.device)
        logits = self.causal_lm.get_output_embeddings()(hidden).float()  # (N, V)
        if self.logit_scale != 1:  # multiplying N x V numbers by 1 would take time
            logits = logits * self.logit_scale
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        if temperature != 1:
            logits = logits / temperature
        logp = logits.log_softmax(-1)
        entropy = -logp.detach().exp().mul_(logp.detach()).sum(-1)
        return logp.gather(1, sampled[:, None])[:, 0], entropy

    def adapter_state(self):
        """A copy of all adapters' weights, for train_state.pt."""
        return {key: p.detach().clone() for key, p in self.causal_lm.named_parameters() if "lora_" in key}

    def load_adapter_state(self, state):
        """Load all adapters' weights from what adapter_state returned."""
        for key, p in self.causal_lm.named_parameters():
            if "lora_" in key:
                p.data.copy_(state[key])

    def save_adapter(self, name, out_dir):
        """Save out_dir/name/ in PEFT's format, with the base's fingerprint; each file is replaced atomically."""
        with writing(f"{out_dir}/{name}"), tempfile.TemporaryDirectory(dir=out_dir, prefix=".saving-") as build:
            self.peft.save_pretrained(build, selected_adapters=[name])
            write_text(os.path.join(build, name, "base.json"),
                       json.dumps({"model": self.folder, "fingerprint": self.fingerprint}))
            os.makedirs(os.path.join(out_dir, name), exist_ok=True)
            for file in os.listdir(os.path.join(build, name)):
                os.replace(os.path.join(build, name, file), os.path.join(out_dir, name, file))


def generate(lms, rows, prompts, uniforms, temperature=1.0, top_p=1.0, prompt_cache=None):
    """LanguageModel.generate for agents with different bases, one batch per base: (tokens, logps, texts).

    lms: one per agent; rows: the (episode, agent) of each row, grouped by agent; also its id in prompt_cache.
    """
    tokens, logps, texts = [], [], []
    for lm, group in itertools.groupby(range(len(rows)), lambda n: lms[rows[n][1]]):
        batch = list(group)
        sampled = lm.generate([f"agent_{rows[n][1]}" for n in batch], [prompts[n] for n in batch], uniforms[batch],
                              temperature, top_p, [rows[n] for n in batch], prompt_cache)
        tokens, logps, texts = tokens + sampled[0], logps + sampled[1], texts + lm.decode(sampled[0])
    return tokens, logps, texts


# --- decentralised execution ------------------------------------------------------------------------------------------


def agent_process(connection, folder, adapter, agent, device, seed, max_new_tokens, temperature, top_p):
    """One agent in a process of its own: it loads the base and its adapter, and sees only its own histories."""
    torch.set_num_threads(1)
    try:
        lm = LanguageModel(folder, device)
        lm.add_adapter("agent", adapter)
    except Exception as error:  # a third-party adapter can fail in any way
        return connection.send(InputError(f"{adapter} cannot be used: {first_line(error)}"))
    generator = torch.Generator().manual_seed((seed * 1000 + agent) % 2 ** 63)
    with contextlib.suppress(EOFError, BrokenPipeError):  # main exits early if another agent fails, on Ctrl-C
        while (messages := connection.recv()) is not None:
            uniforms = torch.rand(1, max_new_tokens, generator=generator)
            tokens, _ = lm.generate(["agent"], [lm.render(messages, max_new_tokens)], uniforms, temperature, top_p)
            connection.send(lm.decode(tokens)[0])


def merge(folder, adapter, target):
    """Merge an adapter into the base in folder and save an ordinary model folder, atomically."""
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
    parser = argparse.ArgumentParser(description="Run a trained team: one process per agent, no critic.")
    parser.add_argument("out_dir", help="folder of a run, such as out/cc-strbuild")
    parser.add_argument("--string", help="strbuild: what to build (default: the first held-out item)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--merge", metavar="FOLDER", help="instead, save merged models FOLDER/agent_0, ...")
    args = parser.parse_args()
    with exit_on_error(parser):
        init_distributed(args.device)  # checks that the device exists
        try:
            with open(os.path.join(args.out_dir, "config.json")) as file:
                config = json.load(file)
        except (OSError, ValueError):
            raise InputError(f"{args.out_dir} is not a run folder: it has no readable config.json.") from None
        if not isinstance(config, dict) or "out_dir" not in config:
            raise InputError(f"{args.out_dir} is not a run folder: its config.json is from something else.")
        if not os.path.isdir(os.path.join(args.out_dir, "agent_0")):
            raise InputError(f"{args.out_dir} has no trained agents yet.")
        task = get_task(config["task"], **{name: config[name] for name in TASK_OPTIONS if name in config})
        if args.string is not None and config["task"] != "strbuild":
            raise InputError(f"--string is for strbuild; this team plays {config['task']}.")
        item = task.check({"string": args.string}) if args.string is not None else task.eval_items[0]
        parts = [(folder, os.path.join(args.out_dir, f"agent_{agent}"))
                 for agent, folder in enumerate(model_folders(config["model"], task, build=False))]
        if args.merge is not None:
            if os.path.exists(args.merge):
                raise InputError(f"{args.merge} already exists; choose another folder.")
            for folder, adapter in parts:
                merge(folder, adapter, os.path.join(args.merge, os.path.basename(adapter)))
            return

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the agents, which end when this process does
    context, pipes = multiprocessing.get_context("spawn"), []
    for agent in range(task.num_agents):
        ours, theirs = context.Pipe()
        context.Process(target=agent_process, daemon=True, args=(
            theirs, *parts[agent], agent, args.device, args.seed, config["max_new_tokens"], config["temperature"],
            config["top_p"])).start()
        theirs.close()  # so that recv raises EOFError if the agent dies
        pipes.append(ours)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def receive(agent):
        try:
            reply = pipes[agent].recv()
        except (EOFError, ConnectionError):  # ConnectionError if it died with unread messages
            parser.exit(1, f"error: agent_{agent} died; its output is above.\n")
        if isinstance(reply, InputError):
            parser.exit(2, f"error: {reply}\n")
        return reply

    episode = Episode(item)
    for t in range(task.num_turns):
        for agent, pipe in enumerate(pipes):
            with contextlib.suppress(BrokenPipeError):  # it died; receive reports that
                pipe.send(history(task, episode, agent))  # its own observations, nothing else
        responses = [receive(agent) for agent in range(task.num_agents)]
        episode.turns.append(Turn(None, None, None, responses, task.judge(item, responses, t, episode.world)))
        if episode.turns[-1].outcome.done:
            break
    for pipe in pipes:
        pipe.send(None)
    print(dialogue(task, episode, sys.stdout.isatty()))
    print(f"{item}: score {episode.turns[-1].outcome.score:.1f} after {len(episode.turns)} turns")


if __name__ == "__main__":
    main()
