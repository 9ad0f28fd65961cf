"""
The language model: one frozen base in memory, one LoRA adapter per agent (and critic), sampling and log-probabilities.

    LanguageModel.generate   samples an answer to each of many histories, token by token, with a KV cache
    LanguageModel.logprobs   log pi(a | h) of given answers, differentiable in the adapter's weights
    build_tiny               trains the base model "tiny": a 1M-parameter transformer, on a task's demonstrations

Shapes: B rows, T tokens, N answer tokens of all rows, C hidden size, V vocabulary size, P tokens of the longest prompt.

    python model.py out/cc-strbuild --string CLIM           # run the trained team: one process per agent, no critic
    python model.py out/cc-strbuild out/mc-strbuild --items 20     # compare teams
"""
import argparse
import atexit
import collections
import contextlib
import fcntl
import functools
import inspect
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
import regex
import tiktoken
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer,
                          DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, StaticCache,
                          TopPLogitsWarper)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks import (TASK_OPTIONS, Episode, InputError, Turn, dialogue, exit_on_error, first_line, get_task, history,
                   printable, read_config, write_atomic)

# --- the tiny base ----------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
PLAIN_TEMPLATE = ("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
                  "{% if add_generation_prompt %}### assistant:\n{% endif %}")
# the tiny base has learned the rules from its demonstrations, so its template omits the system message
TEMPLATE = ("{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def train_bpe(texts, pattern):
    """Byte-pair encoding of texts: {token bytes: rank}; ranks 0..255 are the single bytes.

    Each distinct word (a match of pattern) counts once, and merging continues until every word is a single token:
    train_bpe(["aab aab"], r"\\w+|\\s") adds b"aa" with rank 256 and b"aab" with rank 257.
    """
    words = ["".join(f"<{byte:02x}>" for byte in word.encode())  # "ab" is <61><62>, and <6162> when it is merged
             for word in sorted({word for text in texts for word in regex.findall(pattern, text)})]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while counts := collections.Counter(pair for word in words for pair in itertools.pairwise(word[1:-1].split("><"))):
        left, right = max(counts, key=counts.get)
        ranks[bytes.fromhex(left + right)] = len(ranks)
        words = [word.replace(f"<{left}><{right}>", f"<{left}{right}>") for word in words]
    return ranks


def bpe_tokenizer(ranks, pattern, special, **options):
    """A transformers tokenizer with train_bpe's ranks as its vocabulary, followed by the special tokens."""
    converter = TikTokenConverter(vocab_file=ranks, pattern=pattern, extra_special_tokens=special)
    converter.load_tiktoken_bpe = lambda ranks: ranks  # there is no file to read
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **options)


def build_tiny(task, folder, steps=None, lr=2e-3, width=160, layers=3, heads=5):
    """Train the tiny base on task.demonstration and save it as an ordinary model folder; returns the folder.

    GPT-NeoX with weights of standard deviation width^-1/2: with the usual 0.02 its attention stays uniform for long.
    """
    threads, pool = torch.get_num_threads(), []
    torch.set_num_threads(1)  # the same base for any number of threads, and as fast
    warm_up = (steps := steps or task.base_steps) * 2 // 7  # learning-rate warm-up, on exercises only
    rng = random.Random(0)
    torch.manual_seed(0)
    texts = [message["content"] for _ in range(1500) for message in task.demonstration(rng) + task.exercise(rng)]
    ranks = train_bpe(texts, task.pattern)
    encoding = tiktoken.Encoding("tiny", pat_str=task.pattern, mergeable_ranks=ranks,
                                 special_tokens={token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)})
    pad, user, assistant, end = map(encoding.encode_single_token, SPECIAL_TOKENS)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=encoding.n_vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2048, use_parallel_residual=False, hidden_act="relu",
        tie_word_embeddings=True, initializer_range=width ** -0.5, bos_token_id=None, eos_token_id=end,
        pad_token_id=pad, rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), f"building {folder}", unit="step", dynamic_ncols=True, disable=None):
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / max(1, warm_up), cosine)
        if not pool or step == warm_up:  # batches of conversations of similar length need little padding
            conversations = []
            for _ in range(task.base_batch * 16):
                ids, is_target = [], []  # 1 = in the loss: answers and the feedback on them
                talk = task.exercise if step < warm_up or rng.random() < 0.25 else task.demonstration
                for n, message in enumerate(talk(rng)):
                    text = encoding.encode_ordinary(message["content"]) + [end]
                    ids += [user if message["role"] == "user" else assistant] + text
                    is_target += [0] + [int(n > 0)] * len(text)  # the item itself is random: nothing to learn there
                conversations.append((ids, is_target))
            conversations.sort(key=lambda conversation: len(conversation[0]))
            pool = [conversations[i:i + task.base_batch] for i in range(0, len(conversations), task.base_batch)]
            rng.shuffle(pool)
        batch = pool.pop()
        x = pad_sequence([torch.tensor(ids) for ids, _ in batch], True, pad)  # (B, T)
        loss_mask = pad_sequence([torch.tensor(mask) for _, mask in batch], True)[:, 1:].bool()  # (B, T-1)
        hidden = model.base_model(input_ids=x, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, C)
        loss = torch.nn.functional.cross_entropy(model.get_output_embeddings()(hidden[loss_mask]), x[:, 1:][loss_mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    tokenizer = bpe_tokenizer(ranks, task.pattern, SPECIAL_TOKENS, pad_token="<|pad|>", eos_token="<|end|>",
                              additional_special_tokens=["<|user|>", "<|assistant|>"], chat_template=TEMPLATE)
    save_folder(folder, lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path), Path(
        path, "trained_on.txt").write_text(training_checksum(task))))
    return folder


def training_checksum(task):
    """A checksum of what a task's tiny base is trained on: it changes with the expert, the exercises, the pattern."""
    rng = random.Random(0)
    texts = [task.demonstration(rng) + task.exercise(rng) for _ in range(100)]
    return f"{zlib.crc32(json.dumps([texts, task.pattern, task.base_steps, task.base_batch]).encode()):08x}"


def save_folder(folder, save):
    """Call save(temporary folder), then copy its files to `folder`, one by one: no reader sees an incomplete file."""
    try:
        os.makedirs(folder, exist_ok=True)
        for killed in Path(folder).glob(".saving-*"):
            shutil.rmtree(killed)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as build:
            save(build)  # some save into a folder of their own in it, such as PEFT
            for path in sorted(filter(Path.is_file, Path(build).rglob("*")), key=lambda path: path.name):
                write_atomic(Path(folder, path.name), lambda part: shutil.copyfile(path, part))  # trained_on.txt last
    except Exception as error:  # a full disk: safetensors has an exception of its own
        raise OSError(f"{folder} cannot be written: {first_line(error)}") from None

# --- loading and its checks -------------------------------------------------------------------------------------------

def load_tokenizer(name):
    """(tokenizer, id of the token that its chat template puts after an answer, whether that has a system role).

    Gemma ends answers with <end_of_turn>, though its eos_token is <eos>; GPT-2, without a template, gets a plain one.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.chat_template is None:
        bos = tokenizer.bos_token if tokenizer("").input_ids == [tokenizer.bos_token_id] else ""  # Llama, not GPT-2
        tokenizer.chat_template = bos + PLAIN_TEMPLATE

    def text(*roles):  # every message says its role; "" if the template rejects these roles
        messages = [{"role": role, "content": f"<<{role}>>"} for role in roles]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
        except Exception:  # a third-party template can fail in any way
            return ""

    for role in ("user", "assistant"):
        if f"<<{role}>>" not in text("user", "assistant", "user"):
            raise InputError(f"its chat template loses the text of the {role}'s messages")
    end, special = tokenizer.eos_token_id, {k for k, t in tokenizer.added_tokens_decoder.items() if t.special}
    for roles in (("user", "assistant", "user"), ("user", "assistant")):  # the end of a last answer takes precedence
        after = text(*roles).split("<<assistant>>")[-1].lstrip()
        ids = tokenizer(after, add_special_tokens=False).input_ids[:1]
        end = ids[0] if ids and ids[0] in special else end
    return tokenizer, end, "<<system>>" in text("system", "user") or tokenizer.chat_template == TEMPLATE


def model_folders(names, num_agents, base):
    """For each agent its folder or hub id. names: one model, or A,B,... with one each; "tiny" is out/tiny-BASE."""
    folders = [os.path.join("out", f"tiny-{base}") if name == "tiny" else name
               for name in ([names] if os.path.isdir(names) else names.split(","))]
    if len(folders) not in (1, num_agents):
        raise InputError(f"--model {names} names {len(folders)} models for {num_agents} agents.")
    return (folders * num_agents)[:num_agents]


def load_models(names, task, max_new_tokens, *options):
    """The LanguageModel of each agent; agents with the same folder share one object, so its weights are loaded once.

    The tiny base is built if it is missing or was trained on other demonstrations than the task's present ones.
    """
    folders, tiny = model_folders(names, task.num_agents, task.base), os.path.join("out", f"tiny-{task.base}")
    if tiny in folders and (not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0"):
        os.makedirs(tiny, exist_ok=True)
        lock = open(os.open(path := Path(tiny, "trained_on.txt"), os.O_CREAT, 0o666))
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several runs one builds, the others wait; until this function ends
        if (trained_on := path.read_text()) != training_checksum(task):
            print(f"{tiny} was trained on other demonstrations of {task.name}: it is built anew" if trained_on else
                  f"{tiny} is built first, in one to four minutes")
            build_tiny(task, tiny)
    all_gather([])  # barrier: the other ranks wait for the build
    bases = {folder: LanguageModel(folder, *options) for folder in dict.fromkeys(folders)}
    for i, lm in enumerate(lms := [bases[folder] for folder in folders]):
        longest = max(len(lm.render(history(task, Episode(item), i))) for item in task.eval_items)
        if longest + max_new_tokens > lm.context:
            raise InputError(f"{lm.folder} reads {lm.context} tokens; a prompt of {task.name} has {longest}, and "
                             f"{max_new_tokens} new ones must have room.")
    return lms


def memory_gb(device):
    """Peak memory of this process so far in GiB: allocated memory of a GPU, else resident memory."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident) / 2 ** 30

# --- several GPUs or machines -----------------------------------------------------------------------------------------

def init_distributed(device):
    """(rank, world size, device); under torchrun N ranks, with B episodes each, act as one rank with N x B would: each
    draws the same random numbers, plays its shard of the episodes and computes its shard of every gradient."""
    if device == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device != "cpu" and not (regex.fullmatch(r"cuda(:\d+)?", device) and
                                int(device[5:] or 0) < torch.cuda.device_count()):
        raise InputError(f"device must be cpu or an available cuda device, not {device}.")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # NCCL's object collectives and max_memory_allocated use the current one
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:  # only rank 0 prints
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device


def all_gather(items):
    """The concatenation of all ranks' lists, in rank order: [1] on rank 0 and [2, 3] on rank 1 give [1, 2, 3]."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for of_rank in lists for item in of_rank]


def shard(items):
    """This rank's consecutive part of a list or tensor: of [1, 2, 3], rank 0 of 2 gets [1] and rank 1 gets [2, 3]."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return items[len(items) * rank // ranks:len(items) * (rank + 1) // ranks]


def optimizer_step(optimizer, parameters):
    """Sum the gradients of all ranks, clip their global norm at 1 and step; returns the norm before clipping."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if dist.is_initialized():
        flat = torch.nn.utils.parameters_to_vector([p.grad for p in parameters])  # one all-reduce for all tensors
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, [p.grad for p in parameters])
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not norm < math.inf:
        raise FloatingPointError("a gradient is NaN or infinite; lower learning rates may help.")
    if norm > 0:  # 0 teaches nothing, but Adam's momentum would still move the weights
        optimizer.step()
    optimizer.zero_grad()
    return norm

# --- the base and its adapters ----------------------------------------------------------------------------------------

def sample(logits, uniforms, temperature, top_p):
    """Tokens and log-probabilities (B,) for logits (B, V) and one random number in [0, 1) for each row, (B,)."""
    logp = (logits.float() / temperature).log_softmax(-1)
    probs = logp.exp()
    if top_p < 1:  # nucleus: the fewest most likely tokens whose probabilities reach top_p
        probs = TopPLogitsWarper(top_p)(None, logp).exp()
    cdf = probs.cumsum(-1)  # inverse transform sampling: the first token with cdf > u x total (which top_p made < 1)
    token = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).clamp(max=logp.shape[-1] - 1)
    return token[:, 0], logp.gather(-1, token)[:, 0]


def packed_attention(module, query, key, value, attention_mask, packed=None, sliding_window=None, **options):
    """transformers' SDPA; of a packed row (LanguageModel.pack) each sequence attends to its own path alone.

    query: (1, heads, T, D); packed: for each sequence how many of its tokens are new, and the indices of all.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    outputs, module.windowed = [], sliding_window is not None  # windowed: for LanguageModel.check
    for own, path in packed:
        offset, mask = len(path) - own, None  # without a mask, SDPA is causal
        if offset or (sliding_window and sliding_window < len(path)):
            mask = path.new_ones(1, 1, own, len(path), dtype=torch.bool).tril(offset)  # 1 = visible
            mask = mask.triu(offset + 1 - sliding_window) if sliding_window else mask
        q, k, v = query[:, :, path[offset:]], key[:, :, path], value[:, :, path]
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, 1), None

AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


class LanguageModel:
    """A frozen causal LM and its tokenizer, with any number of LoRA adapters (PEFT); one at a time is in use."""

    def __init__(self, folder, device="cpu", rank=16, gradient_checkpointing=False, compiled=False, dtype=None):
        self.folder, self.device, self.rank = folder, device, rank
        self.compiled_step, self.truncated = None, 0  # truncated: inputs that were, on the left
        try:
            self.tokenizer, end, self.has_system_role = load_tokenizer(folder)
            self.causal_lm = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
                attn_implementation="packed", trust_remote_code=False)
        except Exception as error:  # third-party files can fail in any way
            raise InputError(f"{folder} is no model that can be loaded: {first_line(error)}") from None
        self.causal_lm.to(device).eval().requires_grad_(False)
        config, eos = self.causal_lm.config.get_text_config(), self.causal_lm.generation_config.eos_token_id
        self.ends = {end, *(eos if isinstance(eos, list) else [eos])} - {None}  # tokens that end an answer
        if self.tokenizer.chat_template.endswith(PLAIN_TEMPLATE):  # a base model stops at the next message
            self.ends |= {number for token, number in self.tokenizer.get_vocab().items() if "###" in token}
        if not self.ends:
            raise InputError(f"{folder} has no token that could end an answer.")
        rope = getattr(config, "rope_parameters", None) or {}  # longrope: cached keys are wrong beyond the original
        self.context = (rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings")
                        ) or getattr(config, "max_position_embeddings", None) or 10 ** 9
        self.is_small = sum(p.numel() for p in self.causal_lm.parameters()) < 2e7  # as the tiny bases
        probe = torch.cat([p.flatten()[:64] for p in self.causal_lm.parameters()])
        self.fingerprint = zlib.crc32(probe.bfloat16().cpu().view(torch.int16).numpy().tobytes())
        special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self.special_texts = regex.compile("|".join(map(regex.escape, sorted(special, key=len, reverse=True))) or "$.")
        new_name = "cache" in inspect.signature(self.causal_lm.forward).parameters  # since transformers 5.24
        self.cache_argument = "cache" if new_name else "past_key_values"
        if gradient_checkpointing:
            for module in self.causal_lm.modules():  # transformers' own works only in training mode, with dropout
                if isinstance(module, GradientCheckpointingLayer):
                    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
        self.check()  # makes self.peft, too
        if compiled:  # decode with a static cache and CUDA graphs; it has not been timed on a GPU yet
            self.compiled_step = torch.compile(self.causal_lm, mode="reduce-overhead")

    def add_adapter(self, name, folder=None):
        """Add a new LoRA adapter, or one that is saved in a folder, under this name; returns its parameters (fp32)."""
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        try:
            config = LoraConfig.from_pretrained(folder) if folder else config
            self.peft.add_adapter(name, config)
            self.peft.set_adapter(name)
            if folder is not None:
                self.check_base(folder)
                loaded = set_peft_model_state_dict(self.peft, load_peft_weights(folder, self.device), name)
                if wrong := [k for k in loaded.missing_keys if f".{name}." in k] + loaded.unexpected_keys:
                    raise ValueError(f"its weights do not fit, such as {wrong[0]}")
        except Exception as error:  # a third-party adapter can fail in any way
            raise InputError(f"{folder or name} is no adapter of {self.folder}: {first_line(error)}") from None
        return [p for key, p in self.causal_lm.named_parameters() if f".{name}." in key]

    def check_base(self, folder):
        """Raise InputError if the adapter in folder was saved with another base (by fingerprint)."""
        path = Path(folder, "base.json")
        if path.exists() and (base := json.loads(path.read_text()))["fingerprint"] != self.fingerprint:
            raise InputError(f"{folder} was trained on another base: {base['model']} as it was then, not {self.folder}")

    def check(self):
        """Raise InputError unless sampling, updates and plain PEFT agree: unusual architectures break assumptions."""
        prompts = [self.render([{"role": "user", "content": text}]) for text in ("one", "one", "one two three")]
        try:
            self.peft = get_peft_model(self.causal_lm, LoraConfig(
                target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"), "check")  # random A and B
            tokens, sampled, _ = self.generate("check", prompts, torch.tensor([[0.1, 0.8], [0.9, 0.2], [0.6, 0.5]]))
            recomputed, _ = self.logprobs("check", prompts, tokens)
            recomputed.sum().backward()
            plain = []
            for prompt, answer in zip(prompts, tokens):
                ids = torch.tensor([prompt + answer], device=self.device)
                logits = self.causal_lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1]
                plain.append(logits.detach().float().log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0])
            logp = torch.stack([torch.tensor(sum(sampled, []), device=self.device), recomputed])
            error = (logp - torch.cat(plain)).abs().mean(1).max().item()  # NaN if any is
            if not error < (0.01 if self.causal_lm.dtype == torch.float32 else 0.2):
                raise ValueError(f"log-probabilities differ by {error:.2g}")
            if getattr(self.causal_lm.config.get_text_config(), "sliding_window", None) and not any(
                    getattr(module, "windowed", False) for module in self.causal_lm.modules()):
                raise ValueError("its attention does not pass on its sliding window")
        except Exception as error:  # an unsupported model can fail in any way
            raise InputError(f"{self.folder}, a model of type {self.causal_lm.config.model_type}, does not work here: "
                             f"{first_line(error)}") from None
        self.peft.delete_adapter("check")

    def render(self, messages, max_tokens=math.inf):
        """Token ids of a history in the model's chat template, with the generation prompt; thinking is disabled.

        Special tokens that a text spells out, such as <|im_end|>, stay text. More than max_tokens are truncated on the
        left, and counted.
        """
        if messages[0]["role"] == "system" and not self.has_system_role:
            rules, first, *rest = messages
            messages = [first | {"content": f"{rules['content']}\n\n{first['content']}"}, *rest]
        cut = "\ue000"  # a private-use character; text on both sides is tokenized separately
        messages = [message | {"content": self.special_texts.sub(lambda found: found[0][0] + cut + found[0][1:],
                                                                 message["content"])} for message in messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                  enable_thinking=False)
        ids = [i for part in text.split(cut) for i in self.tokenizer(part, add_special_tokens=False).input_ids]
        self.truncated += len(ids) > max_tokens
        return ids[-max(1, min(len(ids), max_tokens)):]

    @contextlib.contextmanager
    def merged(self, name):
        """Use this adapter for sampling; it is added to a copy of the weights of a small base (1.3 times faster)."""
        self.peft.set_adapter(name)
        layers = [module for module in self.causal_lm.modules() if self.is_small and isinstance(module, LoraLayer)]
        weights = {layer: layer.get_base_layer().weight.data for layer in layers}
        try:
            for layer in layers:
                layer.merge(safe_merge=True)  # safe: into a copy
            yield
        finally:  # not PEFT's unmerge, which leaves rounding errors in the base
            for layer, weight in weights.items():
                layer.get_base_layer().weight.data, layer.merged_adapters = weight, []

    @torch.inference_mode()
    def generate(self, name, prompts, uniforms, temperature=1.0, top_p=1.0):
        """Sample one answer of an adapter to each prompt: (tokens, logps, texts), three lists of length B.

        prompts: B lists of token ids; uniforms: (B, max_new_tokens) random numbers in [0, 1), one per sampled token: an
        answer does not depend on the other rows. It ends with an end token unless it was cut at max_new_tokens. logps
        are those of the softmax at `temperature`, before top_p truncates it.
        """
        static, config = self.compiled_step is not None, self.causal_lm.config
        distinct = prompts if static else [prompt for prompt, _ in itertools.groupby(prompts)]  # each is read once
        copies = [k for k, (_, same) in enumerate(itertools.groupby(prompts)) for _ in same]
        P, new = max(map(len, prompts)), uniforms.shape[1]
        length = -(-(P + new) // 128) * 128  # of a static cache: rounded up, so that few are compiled for
        cache = StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
        ids, mask = (pad_sequence([torch.tensor(row) for row in rows], True, 0, "left").to(self.device) for rows in (
            distinct, [[1] * (length - P + len(prompt)) for prompt in distinct]))  # mask: 1 for tokens to come, too
        position = (mask[:, :P].cumsum(1) - 1).clamp(min=0)
        plain = self.is_small and not static and not getattr(config.get_text_config(), "sliding_window", None)
        uniforms, running = uniforms.to(self.device), list(range(len(prompts)))
        tokens, logps = [[] for _ in prompts], [[] for _ in prompts]
        with self.merged(name):
            for t in range(new):
                forward = self.compiled_step if static and t else self.causal_lm
                seen = mask[:, :length if static else P + t]
                seen = seen[:, None, None].bool() if plain and t else seen  # as transformers does, at a higher price
                logits = forward(input_ids=ids, attention_mask=seen, position_ids=position, logits_to_keep=1,
                                 **{self.cache_argument: cache}).logits[:, -1]  # (rows, V)
                if len(logits) < len(running):  # the prompts of several answers have been read
                    cache.batch_select_indices(torch.tensor(copies, device=self.device))
                    logits, mask, position = logits[copies], mask[copies], position[copies]
                token, logp = sample(logits, uniforms[running, t], temperature, top_p)  # (rows,)
                for row, row_token, row_logp in zip(running, token.tolist(), logp.tolist()):
                    if not tokens[row] or tokens[row][-1] not in self.ends:  # with a static cache, ended rows stay
                        tokens[row].append(row_token)
                        logps[row].append(row_logp)
                keep = [k for k, row in enumerate(running) if tokens[row][-1] not in self.ends]
                if not keep:
                    break
                if len(keep) < len(running) and not static:
                    running, index = [running[k] for k in keep], torch.tensor(keep, device=self.device)
                    cache.batch_select_indices(index)
                    token, mask, position = token[index], mask[index], position[index]
                ids, position = token[:, None], position[:, -1:] + 1  # (rows that still run, 1)
        texts = [row[:-1] if row[-1] in self.ends else row for row in tokens]  # ends may be ordinary tokens
        return tokens, logps, self.tokenizer.batch_decode(texts, skip_special_tokens=True)

    def pack(self, sequences, first):
        """(model inputs for B token-id lists as one row without padding, indices of their tokens from first[b] on).

        A prefix that sequences share occurs once: [1, 2, 3] and [1, 2, 4] become [1, 2, 3, 4] at positions [0, 1, 2, 2]
        with the paths [0, 1, 2] and [0, 1, 3]. Turns of an episode share the first observation, answers their prompt.
        """
        tensor = functools.partial(torch.tensor, device=self.device)
        ids, position, packed, paths, last, path = [], [], [], {}, [], []
        for b in sorted(range(len(sequences)), key=sequences.__getitem__):
            shared = len(os.path.commonprefix([last, sequences[b]]))
            last, own = sequences[b], len(sequences[b]) - shared
            paths[b] = path = [*path[:shared], *range(len(ids), len(ids) + own)]
            ids += last[shared:]
            position += range(shared, len(last))
            packed += [(own, tensor(path))] if own else []
        wanted = [token for b, start in enumerate(first) for token in paths[b][start:]]
        return {"input_ids": tensor([ids]), "position_ids": tensor([position]), "packed": packed, "use_cache": False,
                "attention_mask": torch.zeros(1, 1, 1, 1)}, tensor(wanted)  # 4 dimensions: transformers makes no mask

    def hidden(self, name, sequences, first):
        """Last-layer hidden states (N, C) of B token-id lists, from position first[b] to the end of each."""
        self.peft.set_adapter(name)
        inputs, wanted = self.pack(sequences, first)
        return self.causal_lm.base_model(**inputs).last_hidden_state[0, wanted]

    def logprobs(self, name, prompts, tokens, temperature=1.0):
        """log pi of every sampled token and the policy's entropy there, in nats; both (N,), answers concatenated."""
        self.peft.set_adapter(name)
        inputs, wanted = self.pack([p + t[:-1] for p, t in zip(prompts, tokens)], [len(p) - 1 for p in prompts])
        logits = self.causal_lm(**inputs, logits_to_keep=wanted).logits[0]  # (N, V), of these positions only
        logp = (logits.float() / temperature).log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        sampled = torch.tensor(sum(tokens, []), device=self.device)
        return logp.gather(1, sampled[:, None])[:, 0], entropy

    def adapter_state(self):
        """A copy of all adapters' weights by name, for train_state.pt."""
        return {key: p.detach().clone() for key, p in self.causal_lm.named_parameters() if "lora_" in key}

    def load_adapter_state(self, state):
        """Load all adapters' weights from what adapter_state returned; InputError unless they are all there."""
        own = self.adapter_state()
        if not own or any(key not in state or state[key].shape != own[key].shape for key in own):
            raise InputError(f"the saved state does not hold the adapters that {self.folder} has here.")
        self.causal_lm.load_state_dict({key: state[key] for key in own}, strict=False)

    def save_adapter(self, name, out_dir):
        """Save out_dir/name/ in PEFT's format, with the base's fingerprint."""
        save_folder(os.path.join(out_dir, name), lambda path: (
            self.peft.save_pretrained(path, selected_adapters=[name]), Path(path, "base.json").write_text(
                json.dumps({"model": self.folder, "fingerprint": self.fingerprint}))))

# --- decentralised execution ------------------------------------------------------------------------------------------

def serve(args, run, config):
    """Be one agent: for each line of standard input, a history (JSON: a list of messages), print the answer (JSON)."""
    torch.set_num_threads(1)
    folder = model_folders(config["model"], config["num_agents"], config["base"])[args.agent]
    lm = LanguageModel(folder, args.device, dtype=config.get("dtype"))
    lm.add_adapter("agent", os.path.join(run, f"agent_{args.agent}"))
    generator, new = torch.Generator().manual_seed((args.seed * 1000 + args.agent) % 2 ** 63), config["max_new_tokens"]
    for line in sys.stdin:
        prompt, uniforms = lm.render(json.loads(line), lm.context - new), torch.rand(1, new, generator=generator)
        _, _, texts = lm.generate("agent", [prompt], uniforms, config["temperature"], config["top_p"])
        print(json.dumps(texts[0]), flush=True)


def play(task, item, agents):
    """Play one episode; each of the agents, processes that serve, is sent its own history, nothing else."""
    episode = Episode(item)
    while len(episode.turns) < task.num_turns and not (episode.turns and episode.turns[-1].outcome.done):
        for i, agent in enumerate(agents):
            print(json.dumps(history(task, episode, i)), file=agent.stdin, flush=True)
        lines = [agent.stdout.readline() for agent in agents]
        if "" in lines:
            raise InputError(f"agent_{lines.index('')} has died; what it said is above.")
        responses = list(map(json.loads, lines))
        outcome = task.judge(item, responses, len(episode.turns), episode.world)
        episode.turns.append(Turn(None, None, None, responses, outcome))
    return episode


def main():
    parser = argparse.ArgumentParser(description="Run trained teams: one process per agent, no critic.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, such as out/cc-strbuild")
    parser.add_argument("--item", "--string", help="play your own: a text, or a file or - with a text or --data line")
    parser.add_argument("--items", type=int, default=1, help="so many held-out items (default 1), a line each, a mean")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--agent", type=int, help="instead, be this agent: a history per line in, an answer out (JSON)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process and its agents without a traceback
    with exit_on_error():
        init_distributed(args.device)  # checks that the device exists
        if args.agent is not None:
            return serve(args, args.runs[0], read_config(args.runs[0]))
        text = sys.stdin.read() if args.item == "-" else args.item
        text = Path(text).read_text(encoding="utf-8", errors="replace") if os.path.isfile(text or "") else text
        for run in args.runs:
            config = read_config(run)  # not its data, a file that may be gone: built-in items are played
            task = get_task(config["task"], **{name: config[name] for name in TASK_OPTIONS if name != "data"})
            items = task.eval_items[:args.items] if text is None else [task.own_item(text)]
            command = [sys.executable, __file__, run, "--seed", str(args.seed), "--device", args.device, "--agent"]
            agents = [subprocess.Popen([*command, str(i)], text=True, bufsize=1, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE) for i in range(task.num_agents)]
            scores = []
            for item in items:
                episode = play(task, item, agents)
                scores.append(episode.turns[-1].outcome.score)
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback with | head
                print(dialogue(task, episode, os.isatty(1)) * (len(items) == 1) + f"{printable(str(item))[:60]}: score "
                      f"{scores[-1]:.1f} after {len(episode.turns)} turns", flush=True)
                signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # an agent that has died is an error
            if len(items) > 1:
                print(f"{run}: mean score {sum(scores) / len(scores):.1f} of {len(scores)} items", flush=True)


if __name__ == "__main__":
    main()
