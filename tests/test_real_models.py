"""
Real LLMs: common architectures and chat formats, small and with random weights, in whole runs.

Also what only they need: different bases in one team, a limited context, activation checkpointing, several ranks,
adapters merged into plain models.
"""
import copy
import json
import os
import random
import shutil
import signal
import socket

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_model import CONFIGS, LOOP, PECULIAR, SHAPE, make_folder, plain_logprobs, prompts_of, team, uniforms
from test_train import train_lines, wait_for, weights_of
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

import model
from critic import Critic
from model import LanguageModel, load_models, tiny_tokenizer
from tasks import Episode, Turn, get_task, history

ALTERNATE = ("{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}")
CHATML = (LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLMS = {  # name: (config, bos token, chat template in the manner of that family, eos token)
    "Qwen3": (CONFIGS["qwen3"], None, CHATML.replace("assistant\n{% endif %}", "assistant\n{% if enable_thinking is false %}"
                                                     "<think>\n\n</think>\n\n{% endif %}{% endif %}"), "<|im_end|>"),
    "Qwen2.5": (lambda **ids: Qwen2Config(**SHAPE, num_key_value_heads=2, **ids), None,
                "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML,
                "<|im_end|>"),
    "Llama-3": (CONFIGS["llama"], "<s>", "{{ bos_token }}" + LOOP + "<|head|>{{ m.role }}<|end_head|>\n\n{{ m.content | trim }}"
                "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}", "<|eot_id|>"),
    "gemma-3": (PECULIAR["gemma3"], "<s>", "{{ bos_token }}{% set rules = '' %}{% if messages[0].role == 'system' %}"
                "{% set rules = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}" + LOOP + ALTERNATE +
                "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ rules if loop.first else '' }}"
                "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
                "<eos>"),
    "Mistral": (PECULIAR["mistral"], "<s>", "{{ bos_token }}" + LOOP + ALTERNATE + "{% if m.role == 'user' %}[INST] {{ m.content }}"
                " [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}", "</s>"),
    "SmolLM": (lambda **ids: LlamaConfig(**SHAPE, tie_word_embeddings=True, **ids), None, CHATML, "<|im_end|>"),
    "gpt2": (CONFIGS["gpt2"], None, None, "<|endoftext|>")}
SMALL = ["--task", "tldr", "--device", "cpu", "--batch_size", 6, "--minibatches", 1, "--max_new_tokens", 24, "--lora_rank", 4,
         "--lr", 0.01]


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    """llm("Qwen3") is a model folder of that family, made once."""
    tokenizer, folders = tiny_tokenizer(get_task("tldr"), random.Random(0))[1], {}

    def llm(name):
        if name not in folders:
            config, bos, template, eos = LLMS[name]
            own = copy.deepcopy(tokenizer)
            own.add_tokens([AddedToken(token, special=True) for token in (  # as real tokenizers hold them
                "<|im_start|>", "<|im_end|>", "<|head|>", "<|end_head|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>")])
            own.add_special_tokens({"eos_token": eos} | ({"bos_token": bos} if bos else {}))
            own.chat_template = template
            if name == "gpt2":
                own.pad_token = None  # as there
            folders[name] = make_folder(config, tmp_path_factory.mktemp(name) / name, own)
        return folders[name]
    return llm


@pytest.fixture
def train(workplace):
    def train(name, script, *arguments, code=0):
        run = workplace.run(script, *SMALL, "--out_dir", name, *arguments)
        assert run.code == code, run.err[-2000:]
        return workplace.folder / name
    return train


def all_agents(folder):
    return {key: value for key, value in weights_of(folder).items() if key.startswith("agent_")}


# --- every family, from a folder to a deployed agent ------------------------------------------------------------------

@pytest.mark.parametrize("name", LLMS)
def test_two_steps_change_adapters_and_nothing_else(name, llm, inside):
    """Then plain transformers and PEFT give the saved agent's log-probabilities, and so does the merged model."""
    script = {"Qwen2.5": "train_dc.py", "SmolLM": "train_mc.py"}.get(name, "train_cc.py")
    run = inside(script, *SMALL, "--model", llm(name), "--steps", 2, *(["--group_size", 3] if script == "train_mc.py" else []))
    base, folder = AutoModelForCausalLM.from_pretrained(llm(name)), run["args"].out_dir
    lm = run["lms"][0]
    assert run["lms"][1] is lm and len({line["train/reward"] for line in train_lines(folder)}) > 1
    ours = {key.replace("base_layer.", "").replace("base_model.model.", ""): p for key, p in lm.causal_lm.named_parameters()
            if "lora_" not in key}
    assert ours.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(p, ours[key]) and not ours[key].requires_grad for key, p in base.named_parameters())
    moved = [key for key, p in lm.causal_lm.named_parameters() if "lora_B" in key and p.abs().max() > 0]
    assert {key.split(".")[-2] for key in moved} >= {"agent_0", "agent_1"}, "nothing was learned"
    assert all(p.dtype == torch.float32 for key, p in lm.causal_lm.named_parameters() if "lora_" in key)
    turn = run["episodes"][0].turns[0]
    with torch.no_grad():
        now, _ = lm.logprobs(["agent_1"], [turn.prompts[1]], [turn.tokens[1]])
    plain = PeftModel.from_pretrained(base, folder / "agent_1")
    assert torch.allclose(plain_logprobs(plain, turn.prompts[1], turn.tokens[1]), now, atol=1e-4)
    model.merge(llm(name), str(folder / "agent_1"), str(folder / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert torch.allclose(plain_logprobs(merged, turn.prompts[1], turn.tokens[1]), now, atol=1e-3)
    assert merged.config.eos_token_id == base.config.eos_token_id and (folder / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", LLMS)
def test_the_rules_and_the_last_answer_are_in_what_it_reads(name, llm):
    lm, task = LanguageModel(llm(name)), get_task("strbuild")
    episode = Episode({"string": "IC"})
    first = lm.tokenizer.decode(lm.render(history(task, episode, 1)))
    episode.turns.append(Turn(None, None, None, ["one", "two"], task.judge(episode.item, ["one", "two"], 0)))
    text = lm.tokenizer.decode(lm.render(history(task, episode, 1)))
    for part in ("You are builder 2 of 2", "Build 1:I 2:C with white_concrete obsidian.", "two", "Turn 2 of 4."):
        assert text.count(part) == 1, text
    assert "one" not in text.replace("one of", "") .split("Build")[1] and first.count("Build 1:I") == 1
    assert lm.end == lm.tokenizer.convert_tokens_to_ids({"gemma-3": "<end_of_turn>"}.get(name, LLMS[name][3]))
    assert lm.tokenizer.decode(lm.render([{"role": "user", "content": "Do."}])).count("<s>") == (LLMS[name][1] is not None)


# --- a team of different models ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["train_cc.py", "train_dc.py", "train_mc.py"])
def test_agents_with_different_bases(script, llm, inside, workplace):
    names = f"{llm('Qwen3')},{llm('gpt2')}"
    run = inside(script, *SMALL, "--model", names, "--steps", 2, *(["--group_size", 3] if script == "train_mc.py" else []))
    folder, lms = run["args"].out_dir, run["lms"]
    assert [lm.folder for lm in lms] == names.split(",") and lms[0] is not lms[1]
    for agent, lm in enumerate(lms):
        assert json.loads((folder / f"agent_{agent}" / "adapter_config.json").read_text())["base_model_name_or_path"] == lm.folder
        for turn in run["episodes"][0].turns:  # each with its own tokens
            assert lm.decode([turn.tokens[agent]]) == [turn.responses[agent]]
            again, _ = lm.logprobs([f"agent_{agent}"], [turn.prompts[agent]], [turn.tokens[agent]])
            assert len(again) == len(turn.logps[agent])
    if script == "train_cc.py":  # the rest does not depend on the algorithm
        text = lms[0].tokenizer.decode(run["episodes"][0].turns[0].critic_inputs[0])
        assert "concise" in text and "detailed" in text  # both agents' prompts, in the first model's tokens
        before = all_agents(folder)
        resumed = workplace.run(script, *SMALL, "--model", names, "--steps", 2, "--out_dir", folder, "--resume")
        assert resumed.code == 0, resumed.err[-2000:]
        assert all(torch.equal(before[key], value) for key, value in all_agents(folder).items())
        play = workplace.run("model.py", folder, "--device", "cpu")
        assert play.code == 0 and "agent 1 answers" in play.out, play.err[-2000:]
        merged = workplace.run("model.py", folder, "--merge", folder / "plain")
        assert merged.code == 0 and {"agent_0", "agent_1"} == set(os.listdir(folder / "plain")), merged.err[-2000:]
        again = workplace.run("model.py", folder, "--merge", folder / "plain")
        assert again.code == 2 and "already exists" in again.err and again.err.count("\n") == 1


# --- memory: checkpointed activations change nothing but memory -------------------------------------------------------

@pytest.mark.parametrize("name", ["Qwen3", "gemma-3", "gpt2", "opt"])
def test_checkpointed_gradients_are_the_same_and_layers_really_run_twice(name, llm, tmp_path):
    grads, runs = [], []
    folder = llm(name) if name in LLMS else make_folder(PECULIAR[name], tmp_path, AutoTokenizer.from_pretrained(llm("Qwen3")))
    for checkpointing in (False, True):
        lm = LanguageModel(folder, rank=4, gradient_checkpointing=checkpointing)
        assert not lm.causal_lm.training  # opt has dropout
        torch.manual_seed(0)
        for agent in ("agent_0", "agent_1"):
            lm.add_adapter(agent)
        for p in lm.causal_lm.parameters():
            if p.requires_grad:
                p.data = torch.randn_like(p) * 0.2
        prompts = [prompt[-200:] for prompt in prompts_of(lm, 4)]
        tokens, _ = lm.generate(["agent_0"] * 4, prompts, uniforms(4, 12))  # sampling in between keeps its cache
        attention = [m for key, m in lm.causal_lm.named_modules() if key.endswith(("self_attn", ".attn"))]
        count = []
        for module in attention:
            module.register_forward_pre_hook(lambda *_: count.append(1))
        logp, _ = lm.logprobs(["agent_0"] * 2 + ["agent_1"] * 2, prompts, tokens)
        logp.sum().backward()
        runs.append(len(count))
        grads.append({key: p.grad for key, p in lm.causal_lm.named_parameters() if p.grad is not None})
    assert runs == [2, 4]  # two layers
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 8
    assert all(torch.allclose(grads[0][key], grads[1][key], atol=1e-5, rtol=1e-4) for key in grads[0])


@pytest.mark.parametrize("name", ["Qwen3", "gemma-3", "gpt2"])
def test_a_bf16_base_with_fp32_adapters_as_on_a_gpu(name, llm):
    """Sampled and recomputed log-probabilities agree as far as bf16 goes; adapters and their gradients stay fp32."""
    lm = team(llm(name), ["agent_0", "agent_1"], torch.bfloat16)
    lm.can_merge = False
    names, prompts = ["agent_0"] * 3 + ["agent_1"] * 3, prompts_of(lm, 6)
    tokens, logps = lm.generate(names, prompts, uniforms(6, 12))
    again, _ = lm.logprobs(names, prompts, tokens)
    assert again.dtype == torch.float32 and (again - torch.tensor(sum(logps, []))).abs().mean() < 0.1
    again.sum().backward()
    moved = [p for p in lm.causal_lm.parameters() if p.requires_grad and p.grad is not None]
    assert len(moved) > 8 and all(p.dtype == p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in moved)


def test_flags_of_memory_and_attention_give_the_same_run(train, llm):
    arguments = ["--model", llm("Qwen3"), "--steps", 2]
    plain = train("plain", "train_cc.py", *arguments)
    for more in (["--gradient_checkpointing"], ["--micro_batch", 1], ["--attn", "eager"]):
        other = train("with" + "".join(map(str, more)), "train_cc.py", *arguments, *more)
        one, two = all_agents(plain), all_agents(other)
        assert all(torch.allclose(one[key], two[key], atol=1e-3) for key in one) and len(one) > 8
        for before, after in zip(train_lines(plain), train_lines(other), strict=True):
            assert before["train/reward"] == pytest.approx(after["train/reward"])
            assert before["policy/grad_norm"] == pytest.approx(after["policy/grad_norm"], rel=1e-2)


@pytest.mark.parametrize("script, names, more", [
    ("train_cc.py", ["Qwen3"], ["--gradient_checkpointing", "--micro_batch", 2]),
    ("train_dc.py", ["gemma-3"], ["--group_size", 2, "--top_p", 0.8]),
    ("train_mc.py", ["Llama-3", "gpt2"], ["--batch_size", 8])])
def test_runs_on_a_virtual_gpu(script, names, more, llm, workplace, tmp_path):
    """No devices are mixed, nothing waits for a number during the capture of a CUDA graph, and runs can be resumed."""
    posts = [{"prompt": f"{words} day", "split": split} for words, split in [
        ("a first", "train"), ("a second and rather longer", "train"), ("a held-out", "eval")]]
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, posts)))
    for steps in (1, 2):
        run = workplace.run("tests/virtual_gpu.py", script, *SMALL, "--device", "cuda", "--model", ",".join(map(llm, names)),
                            "--data", tmp_path / "posts.jsonl", "--steps", steps, "--out_dir", tmp_path / "run", *more,
                            *["--resume"] * (steps - 1))
        assert run.code == 0, run.err[-2000:]
        replays = int(run.out.split("'replays': ")[1].split("}")[0])
        assert replays >= 22 * (4 - steps) * len(names)  # evaluations and a rollout, all tokens of an answer but two
    lines = train_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and all(line["policy/grad_norm"] > 0 for line in lines)
    changed = [weights.abs().max() for key, weights in weights_of(tmp_path / "run" / "agent_1").items() if "lora_B" in key]
    assert all(0 < weight < 1 for weight in changed)


def test_a_virtual_gpu_minds_devices_and_what_cuda_graphs_forbid(workplace, tmp_path):
    (tmp_path / "script.py").write_text("""
import torch

def refused(function):
    try:
        function()
    except RuntimeError as error:
        print(error)

x, k, n = torch.zeros(3).to("cuda"), torch.tensor([0], device="cuda"), 0
print(x.device, x.is_cuda, torch.ones(3, device=x.device).device, (x + 1).cpu().device)
refused(lambda: x + torch.ones(3))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    refused(x.sum().item)
    refused(x.sum().cpu)
    refused(lambda: x[x > 0])
    refused(lambda: torch.tensor([0.0], device="cuda"))
    x[k] += 1 + n
    k.add_(1)
print(x.tolist())
for n in range(1, 4):  # Python's n was 0 in the capture
    graph.replay()
print(x.tolist(), k.item())
weight = torch.nn.Parameter(torch.ones(2, 3, device="cuda"))
(x @ weight.t()).sum().backward()
print(weight.grad.device, weight.grad.tolist())
""")
    run = workplace.run("tests/virtual_gpu.py", tmp_path / "script.py")
    assert run.out.splitlines()[:9] == [
        "cuda:0 True cuda:0 cpu", "add: tensors on cuda:0 and cpu, the latter of shape (3,)",
        *(f"{what} is not permitted while a CUDA graph is captured" for what in (
            "_local_scalar_dense", "_to_copy", "index", "torch.tensor")),
        "[0.0, 0.0, 0.0]", "[1.0, 1.0, 1.0] 3", "cuda:0 [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]"], run.err


def test_a_cuda_graph_samples_what_single_operations_do(llm, workplace, tmp_path):
    (tmp_path / "script.py").write_text(f"""
import torch
import virtual_gpu
from model import LanguageModel

lm = LanguageModel({llm("Qwen3")!r}, "cuda", rank=4)
for name in ("agent_0", "agent_1"):
    for p in lm.add_adapter(name):
        torch.nn.init.normal_(p, std=0.3)
lm.end = -1  # answers must not end early
rows = ["agent_0"] * 2 + ["agent_1"] * 2, [[5, 6], [6, 6, 7], [7, 6], [8, 6, 7]], torch.rand(4, 24)
graph = lm.generate(*rows)
replays = virtual_gpu.counts["replays"]
virtual_gpu.GPUTensor.is_cuda = False  # then nothing is captured
print(graph == lm.generate(*rows), replays, virtual_gpu.counts["replays"])
""")
    run = workplace.run("tests/virtual_gpu.py", tmp_path / "script.py")
    assert run.out.splitlines()[0] == "True 22 22", run.err


def test_compiled_layers_write_the_same_answers(llm, monkeypatch):
    """torch.compile traces but generates no code, which would take long; updates are not compiled."""
    results, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: compile(network, backend="eager", **options))
    for compiled in (False, True):
        lm = LanguageModel(llm("Qwen3"), rank=4, compiled=compiled)
        torch.manual_seed(0)
        parameters = [p for name in ("agent_0", "agent_1") for p in lm.add_adapter(name)]
        for p in parameters:
            p.data = torch.randn_like(p) * 0.2
        prompts = prompts_of(lm, 6)
        assert lm.static_cache == bool(lm.compiled) == compiled
        tokens, logps = lm.generate(["agent_0"] * 3 + ["agent_1"] * 3, prompts, uniforms(6, 12, 3))
        logp, _ = lm.logprobs(["agent_0"] * 3, prompts[:3], tokens[:3])
        logp.sum().backward()
        results.append([torch.tensor(sum(tokens, [])), torch.tensor(sum(logps, [])), logp, *(p.grad for p in parameters[:8])])
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(*results, strict=True))


def test_layers_that_are_alike_are_compiled_once(tmp_path, llm, monkeypatch):
    """Except for the last one, whose MLP may leave out rows; torch.compile gives up after eight versions of the same code."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda network, **options: compile(network, backend=backend, **options))
    torch._dynamo.reset()
    folder = make_folder(lambda **ids: LlamaConfig(**SHAPE | {"num_hidden_layers": 5}, **ids), tmp_path,
                         AutoTokenizer.from_pretrained(llm("Qwen3")))
    lm = LanguageModel(folder, rank=4, compiled=True)
    model.fuse_rms_norms(lm.causal_lm)  # as on a GPU
    lm.can_merge = False
    for name in ("agent_0", "agent_1"):
        lm.add_adapter(name)
    lm.generate(["agent_0"] * 2 + ["agent_1"] * 2, prompts_of(lm, 4), uniforms(4, 4))
    assert len(lm.compiled) == 5 and len(graphs) == 2


# --- several ranks ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, episodes, more", [
    ("train_cc.py", 12, []), ("train_dc.py", 12, []), ("train_mc.py", 12, []), ("train_mc.py", 16, ["--tree"])])
def test_two_ranks_are_one_rank_with_twice_the_episodes(script, episodes, more, train, workplace, llm):
    """Step by step the same rewards, losses and gradients; then the same agents, saved once."""
    arguments = ["--minibatches", 2] + (
        ["--model", llm("Qwen3"), "--group_size", 3, "--steps", 2] if script == "train_mc.py" and not more else
        ["--model", workplace.tiny, "--task", "strbuild", "--num_turns", 2, "--steps", 1])  # targets and trees need turns
    arguments += [*more, "--group_size", 2, "--batch_size", episodes // 2] if more else []
    name = "-".join([script, *more])
    one = train(f"one-{name}", script, *arguments, "--batch_size", episodes)
    port = socket.create_server(("localhost", 0)).getsockname()[1]
    ranks = [workplace.start(script, *SMALL, *arguments, "--out_dir", f"two-{name}", environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test"}) for rank in (0, 1)]
    for run in ranks:
        run.process.join(120)
        assert run.process.exitcode == 0, run.err.read_text()[-2000:]
    assert "step 1" in ranks[0].out.read_text() and ranks[1].out.read_text() == ""
    two = workplace.folder / f"two-{name}"
    for left, right in zip(train_lines(one), train_lines(two), strict=True):
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    before, after = all_agents(one), all_agents(two)
    assert before.keys() == after.keys()
    left, right = (torch.cat([weights[key].flatten() for key in before]) for weights in (before, after))
    assert (left - right).norm() < 0.01 * left.norm()  # where a gradient is 0, Adam turns rounding errors into steps
    assert sum("eval/score" in line for line in (two / "log.jsonl").read_text().splitlines()) == 2  # one rank writes


def test_two_ranks_stop_together(workplace, tmp_path):
    """A signal may reach only one rank, and neither may wait for the other; one has no share of a one-episode minibatch."""
    port = socket.create_server(("localhost", 0)).getsockname()[1]
    ranks = [workplace.start("train_cc.py", *SMALL, "--task", "strbuild", "--model", workplace.tiny, "--num_turns", 2, "--steps", 99,
                             "--batch_size", 1, "--minibatches", 2,
                             "--out_dir", tmp_path / "stopped", environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test"}) for rank in (0, 1)]
    wait_for(ranks[0], tmp_path / "stopped" / "log.jsonl", "train/reward")
    os.kill(ranks[1].process.pid, signal.SIGTERM)
    for run in ranks:
        run.process.join(60)
        assert run.process.exitcode == 130, run.err.read_text()[-2000:]
    step = train_lines(tmp_path / "stopped")[-1]["step"]
    assert torch.load(tmp_path / "stopped" / "train_state.pt", weights_only=False)["progress"]["step"] == step < 99


# --- the context ------------------------------------------------------------------------------------------------------

def test_what_does_not_fit_is_cut_on_the_left_and_counted(llm):
    lm = LanguageModel(llm("Llama-3"))
    talk = [{"role": "user", "content": "old " * 400}, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "new"}]
    whole = lm.render(talk)
    assert lm.context == 512 and len(whole) < 512 and lm.render(talk, 512 - len(whole)) == whole and lm.truncated == 0
    assert lm.render(talk, 200) == whole[-312:] and lm.truncated == 1
    lm.generate([None], [lm.render(talk, 200)], uniforms(1, 200))
    critic = Critic(lm, "critic", 1, 2048)
    assert len(critic.input_ids([[{"role": "user", "content": "x y " * 400}]])) == 512 and critic.truncated == 1


def test_an_overlong_history_is_logged(inside, llm, tmp_path):
    """Prompts fit at first; a long answer makes the next history too long."""
    items = tmp_path / "items.jsonl"
    items.write_text('{"string": "ICML"}\n{"string": "CLIM", "split": "eval"}\n')
    run = inside("train_cc.py", "--task", "strbuild", *SMALL[2:], "--num_turns", 2, "--model", llm("gpt2"), "--steps", 1,
                 "--max_new_tokens", 170, "--data", items)
    line = train_lines(run["args"].out_dir)[0]
    assert line["prompt/truncated"] > 0 and line["train/turns"] == 2
    assert all(len(prompt) <= run["lms"][0].context - 170 for e in run["episodes"] for turn in e.turns for prompt in turn.prompts)


# --- what cannot be used ----------------------------------------------------------------------------------------------

def test_models_and_adapters_that_do_not_fit(llm, workplace, train, tmp_path):
    """One sentence, exit code 2, and no folder."""
    files = tmp_path
    weightless, broken, other = files / "weightless", files / "broken", files / "other"
    for path in (weightless, broken, other):
        shutil.copytree(llm("Qwen3"), path)
    os.remove(weightless / "model.safetensors")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:3000])
    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(other)
        network.get_input_embeddings().weight[0, 0] += 1
        network.save_pretrained(other)
    run = train("mine", "train_cc.py", "--model", llm("Qwen3"), "--steps", 1)
    shutil.copytree(run, files / "moved")
    config = json.loads((run / "config.json").read_text())
    (files / "moved" / "config.json").write_text(json.dumps(config | {"model": str(other)}))
    for arguments, message in [
            (["--model", weightless], "no weights"), (["--model", broken], "cannot be loaded"),
            (["--model", f"{llm('Qwen3')},{llm('gpt2')},tiny"], "3 models for 2 agents"),
            (["--model", llm("Qwen3"), "--max_new_tokens", 500], "does not fit into the 512 tokens"),
            (["--model", llm("Qwen3"), "--attn", "psychic"], "psychic"),
            (["--model", other, "--out_dir", tmp_path / "moved", "--eval_only"], "trained on another base"),
            (["--model", other, "--out_dir", tmp_path / "moved", "--steps", 1, "--resume"], "trained on another base")]:
        refused = workplace.run("train_cc.py", *SMALL, "--out_dir", tmp_path / "unborn", *arguments)
        assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1, refused.err
        assert not (files / "unborn").exists()
    for more in ([], ["--merge", tmp_path / "unborn"]):
        refused = workplace.run("model.py", tmp_path / "moved", "--device", "cpu", *more)
        assert refused.code == 2 and "trained on another base" in refused.err and refused.err.count("\n") == 1, refused.err
    assert not (files / "unborn" / "agent_0").exists()
    (files / "moved" / "agent_0" / "base.json").write_text('{"model": "')
    refused = workplace.run("model.py", tmp_path / "moved", "--device", "cpu")
    assert refused.code == 2 and "base.json cannot be read" in refused.err and refused.err.count("\n") == 1, refused.err


def test_a_merged_model_keeps_the_precision_of_its_base(llm, tmp_path):
    AutoModelForCausalLM.from_pretrained(llm("Qwen3"), dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llm("Qwen3")).save_pretrained(tmp_path / "base")
    team(str(tmp_path / "base"), ["agent_0"]).save_adapter("agent_0", str(tmp_path))
    model.merge(str(tmp_path / "base"), str(tmp_path / "agent_0"), str(tmp_path / "merged"))
    assert {p.dtype for p in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_prompts_of_training_items_have_to_fit_for_every_agent(llm):
    lm, task = LanguageModel(llm("Qwen3")), get_task("strbuild")
    task.eval_items, task.train_items = [{"string": "I"}], [{"string": "ICML"}]
    task.palettes = [["stone"], ["oak_planks", "obsidian", "white_concrete"]]
    short, long = (len(lm.render(history(task, Episode(task.train_items[0]), agent))) for agent in range(2))
    assert short < long
    with pytest.raises(ValueError, match=f"has {long} tokens; with {513 - long} new ones"):
        load_models(llm("Qwen3"), task, 513 - long)
    assert len(load_models(llm("Qwen3"), task, 512 - long)) == 2


def test_load_models_shares_a_base(llm):
    task = get_task("tldr")
    one, two = load_models(llm("Qwen3"), task, 24)
    assert one is two
    one, two = load_models(f"{llm('Qwen3')},{llm('gpt2')}", task, 24)
    assert one is not two and team(llm("gpt2"), ["agent_0"]).fingerprint == two.fingerprint != one.fingerprint
