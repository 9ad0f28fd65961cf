"""The language model and the critic: every log-probability is computed a second time, by plain transformers and PEFT."""
import contextlib
import copy
import gc
import itertools
import os
import random

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from tokenizers import processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, AutoTokenizer, BloomConfig, CohereConfig, DeepseekV3Config,
                          Gemma2Config, Gemma3TextConfig, Gemma3nTextConfig, GPT2Config, GPTJConfig, GPTNeoXConfig, GraniteConfig, Lfm2Config, LlamaConfig,
                          MistralConfig, MixtralConfig, OPTConfig, Phi3Config, PhimoeConfig, Qwen3Config, RwkvConfig)

import model
from critic import Critic, baselines, critic_messages, explained_variance, explained_variance_stats, td_targets
from model import (LanguageModel, Packed, build_tiny, fuse_rms_norms, jit_trace, micro_batches, padded,
                   tiny_tokenizer, train_bpe)
from tasks import Episode, InputError, Outcome, Turn, get_task

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=512)
CONFIGS = {"neox": lambda **ids: GPTNeoXConfig(**SHAPE, **ids), "gpt2": lambda **ids: GPT2Config(n_embd=32, n_layer=2, n_head=4, **ids),
           "llama": lambda **ids: LlamaConfig(**SHAPE, num_key_value_heads=2, **ids),
           "qwen3": lambda **ids: Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **ids)}
# these use sliding windows (phimoe's are in its masks only), scale or cap their logits after the output layer, have no fused attention, share keys
# and values between layers or compress them, have experts, or have layers with a state instead of keys and values
PECULIAR = {"mistral": lambda **ids: MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=16, **ids),
            "gemma3": lambda **ids: Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=16, **ids),
            "gemma2": lambda **ids: Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0, **ids),
            "cohere": lambda **ids: CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.25, **ids),
            "bloom": lambda **ids: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ids),
            "granite": lambda **ids: GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=4.0, **ids),
            "gptj": lambda **ids: GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=512, **ids),
            "opt": lambda **ids: OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, **ids),
            "gemma3n": lambda **ids: Gemma3nTextConfig(
                **SHAPE | {"num_hidden_layers": 4}, num_key_value_heads=2, head_dim=8, sliding_window=16, num_kv_shared_layers=2,
                layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=8, laurel_rank=4,
                vocab_size_per_layer_input=ids["vocab_size"], activation_sparsity_pattern=[0.0] * 4, **ids),
            "phimoe": lambda **ids: PhimoeConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, sliding_window=16, **ids),
            "mixtral": lambda **ids: MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, **ids),
            "deepseek": lambda **ids: DeepseekV3Config(
                **SHAPE, num_key_value_heads=4, head_dim=8, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
                moe_intermediate_size=32, first_k_dense_replace=1, **ids),
            "lfm2": lambda **ids: Lfm2Config(**SHAPE | {"num_hidden_layers": 3}, num_key_value_heads=2,
                                             layer_types=["conv", "full_attention", "conv"], **ids)}


@pytest.fixture(scope="session")
def tokenizers():
    return tiny_tokenizer(get_task("strbuild"), random.Random(0))


def make_folder(config, path, tokenizer):
    """A model folder as a user might bring one; its random weights are large enough for its answers to differ."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), bos_token_id=None,
                                                      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    for key, p in network.named_parameters():
        if p.ndim == 2 or key.endswith("bias"):
            p.data.normal_(0, 0.2)
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session", params=CONFIGS)
def folder(request, tokenizers, tmp_path_factory):
    return make_folder(CONFIGS[request.param], tmp_path_factory.mktemp(request.param), tokenizers[1])


def team(folder, names=("agent_0", "agent_1", "critic"), dtype=torch.float32):
    """A language model with adapters that have moved away from their initial zero."""
    lm = LanguageModel(folder, rank=4)
    lm.causal_lm.to(dtype)
    torch.manual_seed(1)
    for name in names:
        lm.add_adapter(name)
    for name in names:  # after all have been added: none may have been changed by another one's arrival
        for key, p in lm.causal_lm.named_parameters():
            if f".{name}." in key:
                p.data = torch.randn_like(p) * 0.2
    return lm


def uniforms(B, T, seed=0):
    """The random numbers of B rows that may sample T tokens each."""
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed))


def prompts_of(lm, count):
    """Histories of very different lengths, so that rows are padded a lot."""
    task, rng = get_task("strbuild"), random.Random(4)
    return [lm.render(task.demonstration(rng)[:1 + 2 * (i % 2)]) for i in range(count)]


def likely_to_end(lm):
    """Bias the model so that some answers stop early and some never."""
    head = lm.causal_lm.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)).index_fill_(0, torch.tensor(lm.end), 4.0), requires_grad=False)


def plain_logprobs(network, prompt, answer):
    """Of one row, without padding or cache, from the library's own logits: (N,)."""
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([prompt + answer])).logits[0].float()
    logp = logits.log_softmax(-1)
    return torch.tensor([logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])


# --- chat formats -----------------------------------------------------------------------------------------------------

LOOP = "{% for m in messages %}"
CHATS = {  # name: (template in the manner of that family, what ends an answer, what two messages and the prompt become)
    "qwen3": (LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>"
              "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
              "<|im_end|>", "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nDo.<|im_end|>\n<|im_start|>assistant\n"
              "<think>\n\n</think>\n\n"),
    "llama3": (LOOP + "<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start|>"
               "assistant\n\n{% endif %}", "<|eot_id|>", "<|start|>system\n\nRules.<|eot_id|><|start|>user\n\nDo.<|eot_id|>"
               "<|start|>assistant\n\n"),
    "gemma": ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LOOP + "<start_of_turn>"
              "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
              "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}", "<end_of_turn>",
              "<start_of_turn>user\nRules.\n\nDo.<end_of_turn>\n<start_of_turn>model\n"),
    "mistral": ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + LOOP + "{% if m.role == 'user' %}"
                "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}", "<|end|>",
                "[INST] Rules.\n\nDo. [/INST]"),
    "glm": (LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
            "<|user|>", "<|system|>\nRules.<|user|>\nDo.<|assistant|>\n"),  # an answer ends where the next message begins
    "forgets": (LOOP + "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}\n<|im_end|>\n{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|im_end|>",  # leaves out the system message
                "<|im_start|>user\nRules.\n\nDo.\n<|im_end|>\n<|im_start|>assistant\n"),
    "none": (None, "<|end|>", "system: Rules.\nuser: Do.\nassistant:")}


@pytest.mark.parametrize("name", CHATS)
def test_every_chat_format_is_spoken_and_its_end_is_known(name, tokenizers, tmp_path):
    template, end, expected = CHATS[name]
    tokenizer = copy.deepcopy(tokenizers[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|start|>", "<|eot_id|>",
                                                                "<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = template
    folder = make_folder(CONFIGS["llama"], tmp_path, tokenizer)
    model.check_model(folder, 2)
    lm = team(folder, ["agent_0"])
    talk = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Do."}]
    assert lm.tokenizer.decode(lm.render(talk)) == expected
    assert lm.end == tokenizer.convert_tokens_to_ids(end)
    more = talk + [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "Again."}]
    assert lm.tokenizer.decode(lm.render(more)).startswith(expected[:20]) and "Again." in lm.tokenizer.decode(lm.render(more))
    likely_to_end(lm)
    tokens, _ = lm.generate(["agent_0"] * 8, [lm.render(more)] * 8, uniforms(8, 16))
    assert {answer[-1] for answer in tokens if len(answer) < 16} == {lm.end}


def test_a_base_model_without_a_chat_format_reads_its_first_token_all_the_same(tokenizers, tmp_path):
    tokenizer = copy.deepcopy(tokenizers[1])
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    lm = LanguageModel(make_folder(CONFIGS["llama"], tmp_path, tokenizer))
    ids = lm.render([{"role": "user", "content": "Do."}])
    assert ids.count(begin) == 1 and lm.tokenizer.decode(ids) == "<|begin|>user: Do.\nassistant:"


@pytest.mark.parametrize("template, message", [("{{ raise_exception('roles, please') }}", "roles, please"), ("{% for %}", "")])
def test_a_broken_chat_template_is_one_sentence(template, message, tokenizers, tmp_path):
    tokenizer = copy.deepcopy(tokenizers[1])
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="no model folder or id that can be loaded: .*" + message) as refused:
        model.check_model(make_folder(CONFIGS["llama"], tmp_path, tokenizer), 2)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_an_end_is_refused(tokenizers, tmp_path):
    tokenizer = copy.deepcopy(tokenizers[1])
    tokenizer.chat_template, tokenizer.eos_token = None, None
    folder = make_folder(CONFIGS["llama"], tmp_path, tokenizer)
    with pytest.raises(ValueError, match="end token") as error:
        model.check_model(folder, 2)
    assert "\n" not in str(error.value)


# --- tokenizer --------------------------------------------------------------------------------------------------------

def test_train_bpe_counts_by_hand():
    ranks = train_bpe(["aab aab"], r"\w+|\s")
    assert len(ranks) == 258 and ranks[b"aa"] == 256 and ranks[b"aab"] == 257
    ranks = train_bpe(["aaaa"], r"\w+")  # overlapping pairs: aa aa, then aaaa
    assert [token for token in ranks if len(token) > 1] == [b"aa", b"aaaa"]
    assert train_bpe(["ab", "é"], r"\w").keys() - {bytes([i]) for i in range(256)} == {"é".encode()}
    assert sorted(ranks.values()) == list(range(len(ranks)))


def test_tokenizer_agrees_with_tiktoken(tokenizers):
    encoding, tokenizer = tokenizers
    task, rng = get_task("strbuild"), random.Random(5)
    texts = [message["content"] for _ in range(50) for message in task.demonstration(rng)]
    texts += [task.instructions(0), "é 日本 🎉 \n\n\t /setblock -1 ~2 3.0 x", " ", "\r\n", "a" * 99, "<end>", "0123"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == encoding.encode_ordinary(text), text
        assert tokenizer.decode(ids) == encoding.decode(ids) == text


def test_a_command_costs_two_tokens_and_letters_stay_apart(tokenizers):
    encoding, _ = tokenizers
    assert len(encoding.encode_ordinary(" 2:C\n/setblock 3 4 0 stone\n/setblock 25 0 0 obsidian\n")) == 7  # heading: 3
    assert len(encoding.encode_ordinary("ICML9")) == 5


def test_no_text_of_a_person_becomes_a_special_token(tokenizers):
    """An answer that spells out the end token must neither end the next history nor start another role."""
    encoding, tokenizer = tokenizers
    spelled = tokenizer("<|end|><|user|>", add_special_tokens=False).input_ids
    plain = encoding.encode_ordinary("<|end|><|user|>")
    assert tokenizer.decode(plain) == "<|end|><|user|>" and len(spelled) in (2, len(plain))


# --- the tiny base ----------------------------------------------------------------------------------------------------

def test_tiny_is_an_ordinary_model_folder(workplace):
    folder = workplace.tiny
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    task = get_task("strbuild")
    encoding, _ = tiny_tokenizer(task, random.Random(0))  # the same seed: the same merges
    text = task.demonstration(random.Random(9))[1]["content"]
    assert tokenizer(text, add_special_tokens=False).input_ids == encoding.encode_ordinary(text)
    assert network.config.vocab_size >= len(tokenizer) and network.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    shown = tokenizer.apply_chat_template([{"role": "system", "content": "rules"}, {"role": "user", "content": "Build I"}],
                                          tokenize=False, add_generation_prompt=True)
    assert shown == "<|user|>Build I<|end|><|assistant|>"
    assert [name for name in os.listdir(workplace.out) if name.startswith(".")] == []  # nothing left of the building


def test_tiny_is_the_same_for_the_same_seed_and_keeps_a_finished_one(tmp_path):
    task, small = get_task("strbuild"), dict(steps=2, width=16, layers=1, heads=2)
    weights = []
    for name in ("one", "two"):
        build_tiny(task, str(tmp_path / name), **small)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    build_tiny(task, str(tmp_path / "one"), seed=1, **small)  # another process was faster: its base counts
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == weights[0]
    build_tiny(task, str(tmp_path / "three"), seed=1, **small)
    assert (tmp_path / "three" / "model.safetensors").read_bytes() != weights[0]


def test_a_folder_that_cannot_be_written_is_found_before_tiny_is_trained(monkeypatch):
    monkeypatch.setattr(model, "tiny_tokenizer", None)  # training needs it first
    with pytest.raises(OSError, match="^/dev/null/tiny cannot be written: "):
        build_tiny(get_task("strbuild"), "/dev/null/tiny")


# --- log-probabilities ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_the_recomputed_ones(folder, temperature):
    """KV cache, left padding, rows that finish early and two agents in a batch do not change log-probabilities."""
    lm = team(folder)
    likely_to_end(lm)
    names, prompts = ["agent_0"] * 6 + ["agent_1"] * 6, prompts_of(lm, 12)
    tokens, logps = lm.generate(names, prompts, uniforms(12, 24), temperature)
    lengths = [len(answer) for answer in tokens]
    assert len(set(lengths)) > 3 and min(lengths) < 12, "the test needs answers of different lengths"
    assert [len(logp) for logp in logps] == lengths and max(lengths) <= 24
    again, entropy = lm.logprobs(names, prompts, tokens, temperature)
    assert torch.allclose(again, torch.tensor([x for logp in logps for x in logp]), atol=1e-4)
    assert entropy.shape == again.shape and (entropy > 0).all()
    stopped = [answer for answer in tokens if answer[-1] == lm.end]  # stopping is a choice with a log-probability
    assert stopped and all(answer.count(lm.end) == (answer[-1] == lm.end) for answer in tokens)
    assert all(len(answer) == 24 for answer in tokens if answer[-1] != lm.end)  # a truncated answer has no end token


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", PECULIAR)
def test_models_with_peculiar_masks_and_logits(name, small, tokenizers, tmp_path):
    """Sampled, recomputed and plain log-probabilities are one and the same for these, too."""
    lm = team(make_folder(PECULIAR[name], tmp_path, tokenizers[1]), ["agent_0", "agent_1"])
    lm.can_merge &= small
    LanguageModel(str(tmp_path)).self_test()
    for agent in ("agent_0", "agent_1"):
        lm.save_adapter(agent, str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(base, tmp_path / "agent_0", adapter_name="agent_0")
    peft.load_adapter(tmp_path / "agent_1", adapter_name="agent_1")
    prompts = prompts_of(lm, 6)
    for names in (["agent_0"] * 6, ["agent_0"] * 4 + ["agent_1"] * 2):
        tokens, logps = lm.generate(names, prompts, uniforms(6, 24))
        again, _ = lm.logprobs(names, prompts, tokens)
        plain = []
        for name, prompt, answer in zip(names, prompts, tokens):
            peft.set_adapter(name)
            plain.append(plain_logprobs(peft, prompt, answer))
        plain = torch.cat(plain)
        assert torch.allclose(again, plain, atol=1e-4)
        assert torch.allclose(torch.tensor([x for logp in logps for x in logp]), plain, atol=1e-4)


def test_a_kind_of_model_that_comes_out_wrong_is_refused(tokenizers, tmp_path, monkeypatch):
    rwkv = make_folder(lambda **ids: RwkvConfig(hidden_size=32, num_hidden_layers=2, context_length=512, **ids),
                       tmp_path / "rwkv", tokenizers[1])  # its state takes the padding in
    with pytest.raises(ValueError, match="a model of type rwkv, does not work here: log-prob"):
        model.load_models(rwkv, get_task("strbuild"), 8)
    llama = make_folder(CONFIGS["llama"], tmp_path / "llama", tokenizers[1])
    fine = LanguageModel(llama)
    fine.self_test()
    assert not any("lora_" in key for key, _ in fine.causal_lm.named_parameters())  # nothing of the check is left
    lm = LanguageModel(llama)
    lm.logit_scale = 0.9
    with pytest.raises(ValueError, match="log-probabilities differ by"):
        lm.self_test()
    lm = LanguageModel(llama)
    logprobs = lm.logprobs
    monkeypatch.setattr(lm, "logprobs", lambda *rows: (logprobs(*rows)[0] * float("nan"), None))
    with pytest.raises(ValueError, match="log-probabilities differ by nan"):
        lm.self_test()
    lm = LanguageModel(llama)  # one that decodes badly, and would end its answers before it does
    likely_to_end(lm)
    forward = lm.causal_lm.forward
    lm.causal_lm.forward = lambda **inputs: forward(**inputs | {"position_ids": inputs["position_ids"] * 0} if inputs[
        "input_ids"].shape[1] < 3 and "position_ids" in inputs else inputs)
    with pytest.raises(ValueError, match="log-probabilities differ by"):
        lm.self_test()
    lm = LanguageModel(llama)  # one that goes wrong where it remembers the turn before
    again = lm.causal_lm.forward
    lm.causal_lm.forward = lambda **inputs: again(**inputs | ({"position_ids": inputs["position_ids"] * 0} if inputs.get(
        "past_key_values") is not None and inputs["past_key_values"].get_seq_length() else {}))
    with pytest.raises(ValueError, match="log-probabilities differ by"):
        lm.self_test()


class Waiting(TorchDispatchMode):
    """Every operation that makes the CPU wait for a number from the GPU is an error, as in the capture of a CUDA graph."""
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation.overloadpacket.__name__ not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero")
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["llama", "dynamic", "longrope", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_a_step_of_sampling_reads_no_number(name, tokenizers, tmp_path):
    ropes = {"dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
             "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [2.0] * 4, "long_factor": [8.0] * 4}}
    config = (CONFIGS | PECULIAR).get(name) or (lambda **ids: (Phi3Config if name == "longrope" else LlamaConfig)(
        **SHAPE, num_key_value_heads=2, rope_parameters=ropes[name], original_max_position_embeddings=256, **ids))
    lm = team(make_folder(config, tmp_path, tokenizers[1]), ["agent_0", "agent_1"])
    lm.static_cache, lm.can_merge = True, False
    forward, steps = lm.causal_lm.forward, []

    def watched(**inputs):
        steps.append(inputs["input_ids"].shape[1])
        with Waiting() if steps[-1] == 1 else contextlib.nullcontext():
            return forward(**inputs)

    lm.causal_lm.forward = watched
    prompts = [prompt[-100:] for prompt in prompts_of(lm, 4)]
    tokens, logps = lm.generate(["agent_0"] * 2 + ["agent_1"] * 2, prompts, uniforms(4, 8))
    assert steps[1:] == [1] * 7
    lm.save_adapter("agent_1", str(tmp_path))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "agent_1")
    assert torch.allclose(plain_logprobs(plain, prompts[3], tokens[3]), torch.tensor(logps[3]), atol=1e-4)


@pytest.mark.parametrize("name, dtype", [("llama", "float32"), ("qwen3", "float32"), ("qwen3", "bfloat16")])
def test_fused_norms_are_the_librarys(name, dtype, tokenizers, tmp_path):
    lm = LanguageModel(make_folder(CONFIGS[name], tmp_path, tokenizers[1]))
    net, ids = lm.causal_lm.to(getattr(torch, dtype)), torch.tensor([prompts_of(lm, 1)[0][-50:]])
    norms = [module for module in net.modules() if "Norm" in type(module).__name__]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5)
    norms[0].variance_epsilon = 0.5
    before = net(input_ids=ids, use_cache=False).logits
    norms[1].forward = lambda x: 2 * F.rms_norm(x, x.shape[-1:])  # computes something else
    fuse_rms_norms(net)
    assert ["forward" in vars(norm) and norm.forward.__name__ for norm in norms] == [
        "<lambda>" if norm is norms[1] else "rms_norm_forward" for norm in norms]
    del norms[1].forward
    after = net(input_ids=ids, use_cache=False).logits
    assert (after - before).abs().mean() < (1e-5 if dtype == "float32" else 0.02) * before.abs().mean()


def test_norms_that_add_one_to_their_weight_are_left_alone(tokenizers, tmp_path):
    lm = LanguageModel(make_folder(PECULIAR["gemma3"], tmp_path, tokenizers[1]))
    fuse_rms_norms(lm.causal_lm)
    assert not any("forward" in vars(module) for module in lm.causal_lm.modules() if "Norm" in type(module).__name__)


def test_positions_that_depend_on_other_rows_are_not_reached(tokenizers, tmp_path):
    """LongRoPE rotates all rows of a forward differently once one of them is longer than the original context."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    lm = team(make_folder(lambda **ids: Phi3Config(**SHAPE, num_key_value_heads=2, rope_parameters=rope,
                                                   original_max_position_embeddings=64, **ids),
                          tmp_path / "phi3", tokenizers[1]))
    prompts = [lm.render([{"role": "user", "content": "A" * n}], 20) for n in (4, 60)]
    assert lm.truncated == 1 and len(prompts[0]) < len(prompts[1]) == 44
    tokens, logps = lm.generate(["agent_0"] * 2, prompts, uniforms(2, 20))
    again, _ = lm.logprobs(["agent_0"], prompts[:1], tokens[:1])
    assert torch.allclose(torch.tensor(logps[0]), again, atol=1e-4)


def test_padded_makes_lists_one_length():
    assert padded([[1, 2], [3]], 0, "cpu").tolist() == [[1, 2], [3, 0]]
    assert padded([[1, 2], [3]], 0, "cpu", left=True).tolist() == [[1, 2], [0, 3]]


def test_an_answer_that_is_cut_has_no_end_token(folder):
    lm = team(folder)
    tokens, logps = lm.generate(["agent_0"] * 4, prompts_of(lm, 4), uniforms(4, 1))
    assert all(len(answer) == len(logp) == 1 for answer, logp in zip(tokens, logps))


def test_mixed_rows_equal_plain_peft_one_adapter_at_a_time(folder, tmp_path):
    """Also: a saved adapter is an ordinary PEFT adapter, and nothing of another adapter is in it."""
    lm = team(folder)
    names, prompts = ["agent_0", "agent_0", "agent_1", "critic"], prompts_of(lm, 4)
    tokens = [[5, 6, 7, lm.end], [300] * 9, [8], [9, 10]]
    with torch.no_grad():
        mixed, _ = lm.logprobs(names, prompts, tokens)
        states = lm.hidden(names, prompts, [len(p) - 1 for p in prompts])
    for name in ("agent_0", "agent_1", "critic"):
        lm.save_adapter(name, str(tmp_path))
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / name))
    base = AutoModelForCausalLM.from_pretrained(folder)
    without = torch.cat([plain_logprobs(base, prompt, answer) for prompt, answer in zip(prompts, tokens)])
    assert torch.allclose(lm.logprobs([None] * 4, prompts, tokens)[0], without, atol=1e-5)
    plain = []
    peft = PeftModel.from_pretrained(base, tmp_path / "agent_0", adapter_name="agent_0")
    for name in ("agent_1", "critic"):
        peft.load_adapter(tmp_path / name, adapter_name=name)
    for row in (3, 2, 1, 0):
        peft.set_adapter(names[row])
        plain.insert(0, plain_logprobs(peft, prompts[row], tokens[row]))
        with torch.no_grad():
            last = peft(input_ids=torch.tensor([prompts[row]]), output_hidden_states=True).hidden_states[-1][0, -1]
        assert torch.allclose(states[row], last, atol=1e-5)
    assert torch.allclose(mixed, torch.cat(plain), atol=1e-5)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("name, first, last", [
    ("qwen3", *2 * [["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]]),
    ("gptj", ["q_proj k_proj v_proj fc_in", "out_proj", "fc_out"],
     ["q_proj k_proj v_proj", "out_proj", "fc_in", "fc_out"]),  # the last MLP reads less than the last attention
    ("gpt2", *2 * [["c_attn", "c_proj", "c_fc", "c_proj"]])])  # Conv1D: inputs x outputs
def test_layers_that_read_the_same_input_are_one(name, first, last, tokenizers, tmp_path):
    lm = team(make_folder({**CONFIGS, **PECULIAR}[name], tmp_path / name, tokenizers[1]))
    names = {layer: key.split(".")[-1] for key, layer in lm.causal_lm.named_modules()}
    assert [" ".join(names[layer] for layer in layers) for layers in lm.siblings] == first + last
    for gradients, lm.can_merge, rows, layers in itertools.product((True, False), (True, False), ([0], [0, 1], [0, 1, 1]), lm.siblings):
        x = torch.randn(len(rows), 3, layers[0].in_features, generator=torch.Generator().manual_seed(0))
        with torch.set_grad_enabled(gradients):  # without, A is in the same matrix as W
            lm.set_rows([f"agent_{agent}" for agent in rows])
            _, _, A, B, mask, _, merge = layers[0].stacked_lora
            assert (A is None) != gradients and (B is None) == (lm.can_merge and not gradients and len(rows) < 3)
            assert (mask is None) == (len(rows) == 1 or B is None) and merge == (lm.can_merge and gradients and len(rows) == 1)
            outputs = [model.lora_forward(layer, x) for layer in layers]
        for layer, y in zip(layers, outputs):  # each layer with the A and B of each row's adapter
            for b, agent in enumerate(rows):
                A, B = layer.lora_A[f"agent_{agent}"].weight, layer.lora_B[f"agent_{agent}"].weight
                assert torch.allclose(y[b], layer.base_layer(x[b]) + layer.scale * x[b] @ A.t() @ B.t(), atol=1e-5)
        assert layers[0].shared is layers[-1].shared and not layers[0].shared  # nothing is kept for longer than needed
        memory = {layer.base_layer.weight.untyped_storage().data_ptr() for layer in layers}
        assert memory == {layers[0].joined[0].untyped_storage().data_ptr()}  # the weights are there once
        lm.set_rows([None])
        assert all(torch.equal(model.lora_forward(layer, x), layer.base_layer(x)) for layer in layers)


def test_the_base_stays_in_memory_once(tokenizers, tmp_path):
    lm = LanguageModel(make_folder(lambda **ids: LlamaConfig(**SHAPE | dict(hidden_size=256), **ids), tmp_path / "wide", tokenizers[1]))

    def memory():
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects()
                    if type(x) in (torch.Tensor, torch.nn.Parameter)}.values())

    lm.can_merge = False
    gc.collect()
    gc.disable()  # in a run there may be no collection for hours
    try:
        before, base = memory(), sum(p.nbytes for p in lm.causal_lm.parameters())
        lm.self_test()
        adapters = [p for name in ("agent_0", "agent_1") for p in lm.add_adapter(name)]
        lm.generate(["agent_0"], [[5, 6]], uniforms(1, 2))
        assert memory() - before < base / 3 + 3 * sum(p.nbytes for p in adapters)
    finally:
        gc.enable()


@pytest.mark.parametrize("merged", [True, False])
def test_a_layer_that_is_more_than_its_weights_is_refused(merged, tokenizers, tmp_path):
    class Rounding(torch.nn.Linear):  # as BitNet's
        def forward(self, x):
            return super().forward(x.round())

    lm = LanguageModel(make_folder(CONFIGS["llama"], tmp_path / "llama", tokenizers[1]))
    lm.can_merge = merged
    lm.self_test()
    lm.causal_lm.model.layers[0].self_attn.v_proj.__class__ = Rounding
    with pytest.raises(InputError, match="log-probabilities differ"):
        lm.self_test()


def test_a_saved_adapter_comes_back(folder, tmp_path):
    lm = team(folder)
    prompts, tokens = prompts_of(lm, 2), [[5, 6, 7], [8, lm.end]]
    before = lm.logprobs(["agent_1", "agent_1"], prompts, tokens)[0]
    lm.save_adapter("agent_1", str(tmp_path))
    fresh = LanguageModel(folder)
    fresh.add_adapter("agent_1", str(tmp_path / "agent_1"))
    assert torch.equal(fresh.logprobs(["agent_1", "agent_1"], prompts, tokens)[0], before)
    state = {key: p.clone() for key, p in lm.adapter_state().items()}  # and through train_state.pt
    for p in lm.causal_lm.parameters():
        if p.requires_grad:
            p.data.zero_()
    assert not torch.equal(lm.logprobs(["agent_1", "agent_1"], prompts, tokens)[0], before)
    lm.load_adapter_state(state)
    assert torch.equal(lm.logprobs(["agent_1", "agent_1"], prompts, tokens)[0], before)


def test_a_saved_file_takes_the_place_of_the_old_one_at_once(workplace, tmp_path):
    lm = team(workplace.tiny, ["agent_0"])
    lm.save_adapter("agent_0", str(tmp_path))
    os.link(tmp_path / "agent_0" / "adapter_model.safetensors", tmp_path / "old")
    before = (tmp_path / "old").read_bytes()
    lm.lora_layers()[0].lora_A["agent_0"].weight.data += 1
    lm.save_adapter("agent_0", str(tmp_path))
    assert (tmp_path / "old").read_bytes() == before != (tmp_path / "agent_0" / "adapter_model.safetensors").read_bytes()


def test_gradients_reach_the_adapters_of_their_own_rows_and_nothing_else(folder):
    lm = team(folder)
    logp, _ = lm.logprobs(["agent_0", "agent_1"], prompts_of(lm, 2), [[5, 6, 7], [8, lm.end]])
    logp[:3].sum().backward()  # the row of agent_0
    touched = {key for key, p in lm.causal_lm.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(".agent_0." in key for key in touched)
    logp, _ = lm.logprobs(["agent_0", "agent_1"], prompts_of(lm, 2), [[5, 6, 7], [8, lm.end]])
    logp[3:].sum().backward()
    touched = {key for key, p in lm.causal_lm.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(".agent_1." in key for key in touched) and not any(".critic." in key for key in touched)
    assert all("lora_" in key for key, p in lm.causal_lm.named_parameters() if p.requires_grad)
    assert all(p.requires_grad for key, p in lm.causal_lm.named_parameters() if "lora_" in key)


def test_fresh_adapters_change_nothing(folder):
    lm = LanguageModel(folder, rank=4)
    returned = [lm.add_adapter(name) for name in ("agent_0", "agent_1")]
    assert len(returned[0]) == len(returned[1]) > 0 and not {*map(id, returned[0])} & {*map(id, returned[1])}
    assert {layer.scale for layer in lm.lora_layers()} == {2.0}  # whatever the rank
    prompts, tokens = prompts_of(lm, 3), [[5, 6, 7]] * 3
    logp, _ = lm.logprobs(["agent_0", "agent_1", "agent_1"], prompts, tokens)
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = torch.cat([plain_logprobs(base, prompt, answer) for prompt, answer in zip(prompts, tokens)])
    assert torch.allclose(logp, plain, atol=1e-5)


# --- sampling ---------------------------------------------------------------------------------------------------------

def test_sampling_follows_the_probabilities(workplace):
    """4,000 first tokens of one history against the softmax, at both temperatures and with top_p."""
    lm = LanguageModel(workplace.tiny)
    lm.add_adapter("agent_0")
    prompt, N = prompts_of(lm, 1)[0], 4000
    generator = torch.Generator().manual_seed(0)
    for temperature, top_p in [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5)]:
        with torch.no_grad():
            lm.set_rows(["agent_0"])
            logits = lm.causal_lm(input_ids=torch.tensor([prompt])).logits[0, -1]
        p = (logits / temperature).softmax(-1)
        if top_p < 1:  # the fewest most likely tokens that reach top_p
            order = p.argsort(descending=True)
            n = int((p[order].cumsum(0) < top_p).sum()) + 1
            allowed = torch.zeros_like(p).index_fill_(0, order[:n], 1)
            p = p * allowed / (p * allowed).sum()
        tokens, _ = lm.generate(["agent_0"] * N, [prompt] * N, torch.rand(N, 1, generator=generator), temperature, top_p)
        counts = torch.bincount(torch.tensor(tokens)[:, 0], minlength=len(p)) / N
        assert not counts[p == 0].any()
        assert (counts - p).abs().max() < 5 * (0.25 / N) ** 0.5  # five standard deviations of the worst case


def test_log_probabilities_are_those_before_top_p_and_entropies_by_hand(folder):
    lm = team(folder)
    prompts = prompts_of(lm, 4)
    tokens, logps = lm.generate(["agent_0"] * 4, prompts, uniforms(4, 8), 0.7, top_p=0.5)
    again, entropy = lm.logprobs(["agent_0"] * 4, prompts, tokens, 0.7)
    assert torch.allclose(again, torch.tensor(sum(logps, [])), atol=1e-4)
    lm.set_rows(["agent_0"])
    with torch.no_grad():
        p = (lm.causal_lm(input_ids=torch.tensor([prompts[0]])).logits[0, -1] / 0.7).softmax(-1)
    assert entropy[0].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-3)


def test_logits_that_are_not_numbers_give_a_token_all_the_same():
    """An index beyond the vocabulary would end a run before the gradient says in one sentence what is wrong."""
    token, _ = model.sample(torch.full((3, 1, 77), float("nan")), torch.rand(3, 1), 1.0, 1.0)
    assert token.max() < 77


def test_a_row_samples_the_same_alone_and_in_company(folder):
    """The generator gives every row its own numbers, whichever rows have finished before it."""
    lm = team(folder)
    likely_to_end(lm)
    prompts = prompts_of(lm, 8)
    one, _ = lm.generate(["agent_0"] * 8, prompts, uniforms(8, 16, 3))
    two, _ = lm.generate(["agent_0"] * 8, prompts, uniforms(8, 16, 3))
    assert one == two
    # other company in rows 4..7, of other lengths: rows 0..3 keep their answers
    three, _ = lm.generate(["agent_0"] * 4 + ["agent_1"] * 4, prompts, uniforms(8, 16, 3))
    assert three[:4] == one[:4] and three[4:] != one[4:]


def test_a_shared_beginning_stands_once():
    row = Packed(["agent_0"] * 2, [[1, 2, 3], [1, 2, 4]], [2, 1], "cpu")
    assert row.ids.tolist() == [[1, 2, 3, 4]] and row.position.tolist() == [[0, 1, 2, 2]] and row.paths == [[0, 1, 2], [0, 1, 3]]
    assert row.wanted.tolist() == [2, 1, 3]
    # [[1, 2, 3], [4]] are the queries of every layer but the last, which is not asked about token 0
    assert [[queries.tolist() for queries, *_ in calls] for calls, _ in row.plans] == [[[[0, 1, 2], [3, 3, 3]]], [[[1, 2], [3, 3]]]]
    row = Packed(["a"] * 2, [[1, 2, 3], [1, 2]], [2, 1], "cpu", [[1, 2, 9], [1, 2]])  # five tokens are in the cache
    assert row.ids.tolist() == [[2, 3]] and row.paths == [[3, 5, 6], [3, 5]] and row.wanted.tolist() == [1, 0]
    row = Packed(["a", "b", "b", "b"], [[7, 8], [7, 8, 9], [7], [7, 8, 9]], [0] * 4, "cpu")  # adapters share nothing
    assert row.ids.tolist() == [[7, 8, 7, 8, 9]] and row.groups == {"a": 2, "b": 3}
    assert row.paths == [[0, 1], [2, 3, 4], [2], [2, 3, 4]]


@pytest.mark.parametrize("name", ["neox", "gemma3", "mistral"])
def test_packed_rows_have_the_values_and_gradients_of_rows_read_alone(name, tokenizers, tmp_path, monkeypatch):
    """Histories that grow, answers of a group, equal rows; sequences of many attention blocks; sliding windows."""
    monkeypatch.setattr(Packed, "BLOCK", 16)
    lm, tokens_read = team(make_folder((CONFIGS | PECULIAR)[name], tmp_path, tokenizers[1]), ["agent_0", "agent_1"]), []
    assert lm.can_pack
    one, two = [random.Random(seed).choices(range(5, 200), k=50) for seed in (1, 2)]
    prompts = [one, one, one + two, two, one + two + one, one[:20], one, one + two]
    answers = [[5, 6, 7], [5, 6], [8] * 20, [9], [10, 11], [12], [5, 6, 7], [13]]
    names = ["agent_0"] * 6 + ["agent_1"] * 2
    weights = torch.rand(sum(map(len, answers)), generator=torch.Generator().manual_seed(0))
    hook = lm.causal_lm.get_input_embeddings().register_forward_hook(lambda _, inputs, __: tokens_read.append(inputs[0].numel()))

    def gradients(rows):
        lm.causal_lm.zero_grad()
        values = [lm.logprobs(*zip(*batch))[0] for batch in rows]
        (torch.cat(values) * weights).sum().backward()
        return torch.cat(values), {key: p.grad.clone() for key, p in lm.causal_lm.named_parameters() if p.grad is not None}

    rows = list(zip(names, prompts, answers))
    values, grads = gradients([rows])
    assert tokens_read == [(50 + 2 + 50 + 19 + 50 + 1) + 50 + (50 + 2 + 50)]
    hook.remove()
    for packs, batches in [(True, [[row] for row in rows]), (False, [[row] for row in rows]), (False, [rows[:6], rows[6:]])]:
        lm.can_pack = packs
        again, other = gradients(batches)
        assert torch.allclose(values, again, atol=1e-4)
        assert grads.keys() == other.keys() and all(torch.allclose(grads[key], other[key], atol=1e-3, rtol=1e-3) for key in grads)


@pytest.mark.parametrize("name", ["neox", "gemma3", "mistral"])
def test_what_was_read_at_the_first_turn_is_not_read_again(name, tokenizers, tmp_path, monkeypatch):
    """Rows that drop out, agents, a prompt that is read in full already, one cut to its beginning, one that is new."""
    monkeypatch.setattr(Packed, "BLOCK", 16)
    lm, reads = team(make_folder((CONFIGS | PECULIAR)[name], tmp_path, tokenizers[1]), ["agent_0", "agent_1"]), []
    one, two, other = [random.Random(seed).choices(range(5, 200), k=50) for seed in (1, 2, 3)]
    rows, prompt_cache = [(k, i) for i in (0, 1) for k in range(10)], {}
    first = lm.generate([f"agent_{i}" for _, i in rows], [[one, two][k % 2] for k, i in rows], uniforms(20, 3), 1.0, 1.0, rows, prompt_cache)
    assert first == lm.generate([f"agent_{i}" for _, i in rows], [[one, two][k % 2] for k, i in rows], uniforms(20, 3), 1.0, 1.0, rows)
    rows = [row for row in rows if row not in [(1, 0), (2, 1)]]
    later = {0: one + two, 2: one + [7], 3: two[:30] + other, 4: one, 5: two[:20], 6: other, 7: two + one, 8: one + two, 9: two}
    names, prompts, draws = [f"agent_{i}" for _, i in rows], [later.get(k, two + [8]) for k, _ in rows], uniforms(18, 3)
    hook = lm.causal_lm.get_input_embeddings().register_forward_hook(lambda _, inputs, __: reads.append(inputs[0].numel()))
    tokens, logps = lm.generate(names, prompts, draws, row_ids=rows, prompt_cache=prompt_cache)
    hook.remove()
    again = lm.generate(names, prompts, draws)
    assert tokens == again[0] and torch.allclose(torch.tensor(sum(logps, [])), torch.tensor(sum(again[1], [])), atol=1e-4)
    # agent 0's rows 0 and 2 to 9, agent 1's 0, 1 and 3 to 7, then its 8 and 9
    assert reads[:2] == [(50 + 1 + 50 + 1 + 1 + 50 + 50 + 0 + 1) + (50 + 1 + 50 + 1 + 1 + 50 + 50), 50 + 1]


def test_a_prompt_that_a_group_shares_is_read_once(folder):
    """The copies differ from there on, and each has the log-probabilities of a row of its own."""
    lm, reads = team(folder), []
    one, two, other = prompts_of(lm, 3)
    names, prompts = ["agent_0"] * 6 + ["agent_1"] * 4, [one, two, one, one, two, one] + [one, other, other, other]
    hook = lm.causal_lm.get_input_embeddings().register_forward_hook(lambda _, inputs, __: reads.append(inputs[0].numel()))
    tokens, logps = lm.generate(names, prompts, uniforms(10, 8))
    hook.remove()
    def distinct(*sequences):
        return len({tuple(sequence[:n]) for sequence in sequences for n in range(1, len(sequence) + 1)})
    assert reads[:2] == [distinct(one, two) + distinct(one, other), 10]
    again, _ = lm.logprobs(names, prompts, tokens)
    assert torch.allclose(torch.tensor(sum(logps, [])), again, atol=1e-4) and len(set(map(tuple, tokens))) > 4


def test_answers_of_a_group_are_those_that_each_row_gives_alone(folder):
    """Four answers to each prompt end at different lengths; in another order they share no row of the batch."""
    lm = team(folder)
    likely_to_end(lm)
    prompts, draws, prompt_cache = prompts_of(lm, 6), uniforms(24, 16, 3), {}
    names, prompts = ["agent_0"] * 12 + ["agent_1"] * 12, [prompts[k // 4] for k in range(24)]
    shapes = []
    hook = lm.causal_lm.get_input_embeddings().register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    tokens, logps = lm.generate(names, prompts, draws, row_ids=list(range(24)), prompt_cache=prompt_cache)
    hook.remove()
    assert shapes[1] == (6, 4) and len({len(answer) for answer in tokens}) > 2
    assert [prompt_cache[k][0] for k in range(24)] == prompts
    order = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    order += [12 + k for k in order]
    other, others = lm.generate(names, [prompts[k] for k in order], draws[order])
    assert other == [tokens[k] for k in order]
    assert torch.allclose(torch.tensor(sum(others, [])), torch.tensor(sum([logps[k] for k in order], [])), atol=1e-4)


# --- the critic -------------------------------------------------------------------------------------------------------

def test_td_targets_by_hand():
    targets, advantages = td_targets([1, 2], [0.5, 1.0], 0.9)
    assert targets == pytest.approx([1.9, 2.0]) and advantages == pytest.approx([1.4, 1.0])
    targets, advantages = td_targets([1, 2], [0.5, 1.0], 1.0, lam=1.0)  # return minus value
    assert targets == pytest.approx([3.0, 2.0]) and advantages == pytest.approx([2.5, 1.0])
    targets, advantages = td_targets([1, 2, 4], [0.5, 1.0, 3.0], 0.5, lam=0.5)
    # deltas 1 + .5 - .5 = 1, 2 + 1.5 - 1 = 2.5, 4 - 3 = 1; A = 1 + .25 (2.5 + .25), 2.5 + .25, 1
    assert advantages == pytest.approx([1.6875, 2.75, 1.0]) and targets == pytest.approx([2.1875, 3.75, 4.0])
    assert td_targets([], [], 0.9) == ([], [])


def played(prompt, *rewards):
    return Episode({}, [Turn([prompt], None, None, None, Outcome(reward, 0, {}, False, [], None)) for reward in rewards])


def test_returns_by_hand():
    assert played([], 1, 2, 4).returns(0.5) == [3, 4, 4] and played([]).returns(0.5) == []


def test_micro_batches_keep_episodes_together_and_turn_them_round():
    a, b, c = played([1, 2], 0, 0), played([3], 0), played([1, 3], 0, 0)
    assert micro_batches([a, b], lambda turn: turn.prompts[0], 2) == [[(a, 1), (a, 0)], [(b, 0)]]
    assert micro_batches([b, c, a], lambda turn: turn.prompts[0], 3) == [[(a, 1), (a, 0), (c, 1)], [(c, 0), (b, 0)]]


def test_ranks_share_the_episodes_of_a_minibatch(monkeypatch):
    a, b, shares = played([1], 0, 0), played([2], 0), []
    monkeypatch.setattr(model.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(model.dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(model.dist, "get_rank", lambda: rank)
        shares.append(micro_batches([b, a], lambda turn: turn.prompts[0], 8))
    assert shares == [[], [[(a, 1), (a, 0)]], [[(b, 0)]]]  # fewer episodes than ranks


def test_a_gradient_longer_than_one_is_shortened_to_one():
    for gradient, moved in (([3.0, 4.0], [-0.6, -0.8]), ([0.3, 0.4], [-0.3, -0.4])):
        p, unused = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
        p.grad = torch.tensor(gradient)
        norm = model.optimizer_step(torch.optim.SGD([p, unused], lr=1.0), [p, unused])
        assert norm == pytest.approx(torch.tensor(gradient).norm().item()) and p.tolist() == pytest.approx(moved, rel=1e-4)
        assert p.grad is None and unused.tolist() == [0]


def test_td_targets_with_lam_one_are_discounted_returns():
    rng = random.Random(0)
    rewards, values = [rng.gauss(0, 1) for _ in range(5)], [rng.gauss(0, 1) for _ in range(5)]
    targets, advantages = td_targets(rewards, values, 0.9, lam=1.0)
    for t in range(5):
        ret = sum(0.9 ** k * reward for k, reward in enumerate(rewards[t:]))
        assert targets[t] == pytest.approx(ret) and advantages[t] == pytest.approx(ret - values[t])


def test_explained_variance_by_hand():
    assert explained_variance([1, 3], [1.5, 2.5]) == pytest.approx(0.75)
    assert explained_variance([1, 3], [7, 7]) == pytest.approx(0) and explained_variance([1, 3], [3, 1]) < -1
    assert explained_variance([2], [5]) == 1  # a single return has nothing to explain


def test_one_turn_with_lam_one_is_return_minus_value():
    """An episode of one turn, reward 0.7, V = 0.25: the advantage is 0.45 and the target the return, for any lambda."""
    for lam in (0.0, 0.5, 1.0):
        targets, advantages = td_targets([0.7], [0.25], gamma=1.0, lam=lam)
        assert targets == pytest.approx([0.7]) and advantages == pytest.approx([0.45])
    # over two turns only lambda 1 is the return [3, 2] minus the value
    assert td_targets([1, 2], [0.5, 1.0], 1.0, lam=1.0)[1] == pytest.approx([3 - 0.5, 2 - 1.0])
    assert td_targets([1, 2], [0.5, 1.0], 1.0, lam=0.0)[1] == pytest.approx([1 + 1.0 - 0.5, 2 - 1.0])


def test_explained_by_hand():
    numbers = explained_variance_stats([[2, 1], [4, 3]], [[3, 1.5], [3, 2.5]])
    assert numbers["value/explained_variance"] == pytest.approx(0.5)
    assert numbers["value/explained_variance_by_turn"] == pytest.approx([0, 0.75])
    assert len(explained_variance_stats([[2, 1], [4]], [[3, 1.5], [3]])["value/explained_variance_by_turn"]) == 2  # one ended early


def test_baselines_by_hand():
    assert baselines([1, 2, 6], "group") == [3, 3, 3] and baselines([1, 2, 6], "loo") == [4, 3.5, 1.5]
    assert baselines([1, 2, 6], "none") == [0, 0, 0] and baselines([5], "group") == baselines([5], "loo") == [5]
    group, loo = ([r - b for r, b in zip([1, 2, 6], baselines([1, 2, 6], kind))] for kind in ("group", "loo"))
    assert [2 * x for x in loo] == pytest.approx([3 * x for x in group])  # leave-one-out is G / (G - 1) times as large


def test_a_joint_history_holds_everything_once():
    task = get_task("strbuild")
    histories = [[{"role": "system", "content": task.instructions(agent)}, {"role": "user", "content": f"Build I with {agent}."},
                  {"role": "assistant", "content": f"answer {agent}\n"}, {"role": "user", "content": "same for both"}]
                 for agent in range(2)]
    joint = critic_messages(histories)
    assert [message["role"] for message in joint] == ["user", "assistant", "user"]
    text = "\n".join(message["content"] for message in joint)
    assert all(text.count(part) == 1 for part in
               ["Build I with 0.", "Build I with 1.", "answer 0", "answer 1", "same for both"])
    alone = critic_messages(histories[1:])
    assert "answer 0" not in str(alone) and "answer 1" in str(alone)
    said = [[{"role": "assistant", "content": number}] for number in "353"]  # every agent's answer is kept, even if equal
    assert critic_messages(said) == [{"role": "assistant", "content": "3\n5\n3"}]


def test_a_critic_keeps_the_newest_tokens_and_counts_what_it_cut(folder):
    lm = LanguageModel(folder, rank=4)
    history = [[{"role": "user", "content": "Build ICML with stone."}, {"role": "assistant", "content": "/setblock 0 0 0 stone\n" * 9},
                {"role": "user", "content": "Turn 2 of 4."}]]
    whole, short = Critic(lm, "critic", 2, 1000), Critic(lm, "other", 2, 12)
    ids = whole.input_ids(history)
    assert whole.truncated == 0 and len(ids) > 12
    assert short.input_ids(history) == ids[-12:] and short.truncated == 1
    exact = Critic(lm, "third", 2, len(ids))
    assert exact.input_ids(history) == ids and exact.truncated == 0
    short.input_ids([[{"role": "user", "content": "I"}]])
    assert short.truncated == 1


def test_values_ignore_padding_and_start_at_the_average_return_of_the_turn(folder):
    lm = LanguageModel(folder, rank=4)
    critic, inputs, turns = Critic(lm, "critic", 3, 1000), prompts_of(lm, 5), [0, 1, 0, 1, 2]
    critic.set_scale([[1.0, -4.0], [3.0]])  # two episodes, the second ends after a turn; none has a third one
    assert torch.allclose(critic(inputs, turns), torch.tensor([2.0, -4.0, 2.0, -4.0, 0.0]))
    torch.manual_seed(0)
    critic.head.weight.data.normal_()
    together = critic(inputs, turns)
    alone = torch.cat([critic([ids], [turn]) for ids, turn in zip(inputs, turns)])
    assert together.shape == (5,) and torch.allclose(together, alone, atol=1e-4)
    together.sum().backward()
    assert all(p.grad is not None for p in critic.weights) and critic.head.weight.grad.abs().sum() > 0
    state = critic.state_dict()
    assert not any("lora" in key for key in state)  # the adapter is saved as an adapter
    fresh = Critic(LanguageModel(folder, rank=4), "critic", 3, 1000)
    fresh.load_state_dict(state)
    fresh.lm[0].load_adapter_state(lm.adapter_state())
    assert torch.equal(fresh(inputs, turns), together)


# --- what is no model -------------------------------------------------------------------------------------------------

def test_check_model_says_in_one_sentence_what_is_wrong(tmp_path, folder):
    model.check_model("tiny", 2)
    model.check_model(folder, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "file").write_text("")
    for name in [str(tmp_path / "empty"), str(tmp_path / "config"), str(tmp_path / "file"), "no/such-model", str(tmp_path / "no")]:
        with pytest.raises(ValueError) as error:
            model.check_model(name, 2)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_the_gpu_that_was_asked_for_is_the_current_one(monkeypatch, folder):
    """A CUDA graph of another GPU would be empty; more ranks than GPUs are refused before they join."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Exception):  # there is none here
        LanguageModel(folder, "cuda:1")
    assert current == ["cuda:1"] and model.init_distributed("cuda:1") == (0, 1, "cuda:1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="not cuda:2"):
        model.init_distributed("cuda")


def test_steps_are_traced_unless_python_decides_in_them():
    state = torch.ones(2, 5)
    traced = jit_trace(lambda x, slots: x.add_(0)[:, :slots.shape[0]].sum(1), (state,), [torch.arange(3)])
    assert isinstance(traced, torch.jit.ScriptFunction)
    assert traced(torch.ones(4, 9), torch.arange(7)).tolist() == [7.0] * 4  # of other sizes, too
    assert state._version == 0  # a copy was traced

    def step(x):
        return x + 1 if x.sum() > 0 else x - 1

    assert jit_trace(step, (torch.ones(2),), []) is step


@pytest.mark.parametrize("name", ["neox", "qwen3", "gemma3", "mistral", "gpt2"])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_answers_sampled_with_a_static_cache(name, top_p, tokenizers, tmp_path, monkeypatch):
    """Traced or not, as a CPU or a GPU does it: groups, agents, prompts of any length, windows, answers that end."""
    lm = team(make_folder((CONFIGS | PECULIAR)[name], tmp_path, tokenizers[1]), ["agent_0", "agent_1"])
    likely_to_end(lm)
    prompts = [prompt for prompt in prompts_of(lm, 6) for _ in range(2)]
    names, draws = ["agent_0"] * 6 + ["agent_1"] * 6, uniforms(12, 40, 5)
    usual, shares = lm.can_pack, lm.can_share_prompts
    results = []
    for packs, traced, static in ((False, False, False), (True, True, False), (True, False, False), (True, False, True)):
        lm.can_pack, lm.can_share_prompts, lm.static_cache, lm.traced_steps = usual and packs, shares and packs, static, {}
        monkeypatch.setattr(model, "jit_trace", jit_trace if traced else lambda step, *_: step)
        results.append(lm.generate(names, prompts, draws, 1.0, top_p))
        if traced:  # once for all calls
            steps = list(lm.traced_steps.values())
            assert bool(steps) == usual and all(type(step) is torch.jit.ScriptFunction for step in steps)
            assert lm.generate(names, prompts, draws, 1.0, top_p) == results[-1] and list(lm.traced_steps.values()) == steps
    (tokens, logps), *others = results
    assert len({len(answer) for answer in tokens}) > 3
    for again, others in others:
        assert again == tokens
        assert torch.allclose(torch.tensor(sum(logps, [])), torch.tensor(sum(others, [])), atol=1e-4)
    assert lm.generate(names, prompts, draws[:, :1])[0] == [answer[:1] for answer in lm.generate(names, prompts, draws)[0]]
    lm.static_cache, lm.traced_steps = False, {}
    monkeypatch.setattr(model, "jit_trace", jit_trace)
    set_rows, counts = lm.set_rows, []  # how many rows of each agent go on (a packed prefill has tokens instead)
    monkeypatch.setattr(lm, "set_rows", lambda names, *wanted: (
        set_rows(names, *wanted), wanted or counts.append([n for _, n in lm.groups]))[0])
    for rows in ([0], [0, 2, 4], [0, 6], range(0, 12, 2), range(0, 12, 5), range(2), range(4), range(12)):  # traced with one row
        counts.clear()
        some = lm.generate([names[row] for row in rows], [prompts[row] for row in rows], draws[list(rows)], 1.0, top_p)[0]
        assert some == [tokens[row] for row in rows]
    (one, two), *dropped = counts
    assert one == two and any(len(rows) == 1 or len(set(rows)) == 2 for rows in dropped) == usual  # unequally many


def test_what_a_traced_step_depends_on(tokenizers, tmp_path):
    """Traces are shared by all calls, and yet adapters, temperature and top_p may change; they keep no KV cache."""
    lm = LanguageModel(make_folder(CONFIGS["qwen3"], tmp_path, tokenizers[1]), rank=4)
    lm.self_test()  # in which answers cannot end
    adapters = [p for name in ("agent_0", "agent_1") for p in lm.add_adapter(name)]
    likely_to_end(lm)
    names, prompts, draws = ["agent_0"] * 3 + ["agent_1"] * 3, prompts_of(lm, 6), uniforms(6, 24)
    answers = []
    for temperature, top_p in ((1.0, 1.0), (1.0, 1.0), (0.5, 1.0), (1.0, 0.5)):
        for p in adapters:
            torch.nn.init.normal_(p, std=0.2)
        tokens, logps = lm.generate(names, prompts, draws, temperature, top_p)
        again, _ = lm.logprobs(names, prompts, tokens, temperature)
        assert torch.allclose(again, torch.tensor(sum(logps, [])), atol=1e-4)
        traced, lm.traced_steps = lm.traced_steps, {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "jit_trace", lambda step, *_: step)
            assert lm.generate(names, prompts, draws, temperature, top_p)[0] == tokens
        lm.traced_steps = traced
        answers.append(tokens)
    assert min(map(len, answers[0])) < 24 and answers[0] != answers[1] and len(lm.traced_steps) > 2
    gc.collect()
    assert not [x.shape for x in gc.get_objects() if type(x) is torch.Tensor and x.dim() == 4 and x.shape[1] == 2]  # KV heads
