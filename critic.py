"""
The critic estimates the value of a history: its own LoRA adapter on the shared frozen base, and a linear value head.

V(h) is computed from the last token's hidden state; no vocabulary logits are computed. CoLLM-CC has one centralized
critic that reads the joint history, CoLLM-DC one critic per agent that reads that agent's own history. Critics are
needed only for training; trained agents work without. Here are also the statistics of a step, which the log holds.
"""
import os
from statistics import fmean as mean

import torch
from torch import nn

from model import all_gather, shard
from tasks import write_atomic


def returns_differ(returns):
    """Whether episodes have different returns at some turn; returns is [episode][turn].

    [[2, 1], [2]] do not differ, [[2, 1], [2, 3]] do. Where they do not, advantages are only errors of V, which
    normalising and Adam would blow up: such a step teaches the actors nothing and must not move them.
    """
    by_turn = [[ret[t] for ret in returns if len(ret) > t] for t in range(max(map(len, returns)))]
    return any(max(at_turn) - min(at_turn) > 1e-6 for at_turn in by_turn)


def explained_variance(returns, values):
    """Share of the returns' variance that the values explain: 1 is perfect, 0 no better than a constant.

    returns [1, 3], values [1.5, 2.5]: the errors [-0.5, 0.5] have variance 0.25, the returns 1, hence 0.75. Equal
    returns give 0: there is nothing to explain.
    """
    returns, values = torch.tensor(returns, dtype=torch.float32), torch.tensor(values, dtype=torch.float32)
    variance = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / variance if variance > 1e-9 else 0.0


def explained_variance_stats(returns, episodes):
    """Explained variance for the log, over all turns and for each turn; returns is [episode][turn].

    Returns [2, 1] and [4, 3] with the values [3, 1.5] and [3, 2.5]: 0 at turn 0, where the values are equal, 0.75 at
    turn 1, 0.5 in all.
    """
    pairs = [[] for _ in range(max(map(len, returns)))]  # of each turn
    for ret, e in zip(returns, episodes):
        for t, turn in enumerate(e.turns):
            pairs[t] += [(ret[t], value) for value in turn.values]  # one of each critic
    return {"value/explained_variance": explained_variance(*zip(*sum(pairs, []))),
            "value/explained_variance_by_turn": [explained_variance(*zip(*own)) for own in pairs]}


def summary(episodes, prefix, gamma, ends):
    """Means over episodes, by log key; the return is discounted from the first turn on.

    ends: the tokens that end an answer of each agent's model, a set.

    Two episodes with rewards [-1, -2] and [-1] and gamma 0.5 have return -1.5, reward -4/3 and turns 1.5.
    """
    turns = [turn for e in episodes for turn in e.turns]
    answers = [tokens for turn in turns for tokens in turn.tokens]
    last = [e.turns[-1].outcome for e in episodes]
    numbers = {
        "return": mean(e.returns(gamma)[0] for e in episodes),
        "reward": mean(turn.outcome.reward for turn in turns), "score": mean(outcome.score for outcome in last),
        "turns": len(turns) / len(episodes), "response_tokens": mean(map(len, answers)),
        "truncated": mean(tokens[-1] not in end for turn in turns for tokens, end in zip(turn.tokens, ends))}
    if prefix == "eval":  # the components of the last turn's reward
        numbers |= {name: mean(outcome.parts[name] for outcome in last) for name, number in last[0].parts.items()
                    if not isinstance(number, list) and name not in numbers}
    return {f"{prefix}/{name}": number for name, number in numbers.items()}


def critic_messages(histories):
    r"""The chat that a critic reads: the histories of the agents it serves, joined message by message.

    The first lines that all agents are told appear once, other lines one agent after another; answers are all there.
    [[user "A post.\nWrite a title."], [user "A post.\nWrite an end."]] gives the user message
    "A post.\nWrite a title.\nWrite an end.". The rules (system messages) are omitted: an agent's rules never change.
    """
    messages = []
    for parallel in zip(*(own[own[0]["role"] == "system":] for own in histories)):  # one message of each agent
        lines, role = [message["content"].strip().split("\n") for message in parallel], parallel[0]["role"]
        shared = os.path.commonprefix(lines) if role == "user" else []
        messages.append({"role": role, "content": "\n".join(sum((own[len(shared):] for own in lines), shared))})
    return messages


class Critic(nn.Module):
    """V(h_t) = mean_t + std_t x head_t(last token's hidden state); mean_t and std_t are the returns' so far.

    The head has one output per turn, because the number of turns left determines most of the return. It is scaled: a
    critic that starts at 0 when returns are near -7 would bootstrap nonsense for the actors until it has caught up.
    """

    def __init__(self, lm, name, num_turns, max_tokens):
        """lm: the LanguageModel that gets its adapter; name: the adapter's; max_tokens: longest input, in tokens."""
        super().__init__()
        self.lm, self.name = [lm], name  # lm in a list, so that it is not a submodule
        self.max_tokens = min(max_tokens, lm.context)
        self.head = nn.Linear(lm.causal_lm.get_input_embeddings().embedding_dim, num_turns, device=lm.device)
        self.weights = [*lm.add_adapter(name), *self.head.parameters()]
        nn.init.zeros_(self.head.weight)  # V starts at the mean return
        nn.init.zeros_(self.head.bias)
        for name, start in ("mean", 0.0), ("std", 1.0), ("steps", 0.0):  # steps: how many mean_t and std_t have seen
            self.register_buffer(name, torch.full((num_turns,), start, device=lm.device))

    def input_ids(self, histories):
        """Token ids of the critic's input, truncated on the left to max_tokens."""
        return self.lm[0].render(critic_messages(histories), self.max_tokens)

    @torch.no_grad()
    def set_scale(self, returns):
        """Update mean_t and std_t with a step's returns [episode][turn]; after the first step, no V changes by that.

        A raw LLM's returns are nearly equal, later ones are not: the scale follows, as in PopArt (arXiv 1602.07714).
        """
        for t in range(max(map(len, returns))):
            at_t, old_mean, old_std = [r[t] for r in returns if len(r) > t], self.mean[t].item(), self.std[t].item()
            self.steps[t] += 1
            weight = max(0.1, 1 / self.steps[t].item())  # of this step: the last ten count most
            square = (1 - weight) * (old_std ** 2 + old_mean ** 2) + weight * mean(x * x for x in at_t)
            self.mean[t] += weight * (mean(at_t) - old_mean)
            self.std[t] = max(0.01, square - self.mean[t].item() ** 2) ** 0.5
            if weight < 1:
                self.head.weight[t] *= old_std / self.std[t]
                self.head.bias[t] = (self.head.bias[t] * old_std + old_mean - self.mean[t]) / self.std[t]

    def save(self, out_dir):
        """Save out_dir/NAME/: the adapter in PEFT's format, and value_head.pt with head and scale."""
        self.lm[0].save_adapter(self.name, out_dir)
        write_atomic(os.path.join(out_dir, self.name, "value_head.pt"), lambda to: torch.save(self.state_dict(), to))

    def forward(self, inputs, turns):
        """V(h_t), on the scale of returns, shape (B,), for B token-id lists and their turn numbers t."""
        hidden = self.lm[0].hidden(self.name, inputs, [len(ids) - 1 for ids in inputs])  # (B, C)
        turn = torch.tensor(turns, device=hidden.device)
        return self.mean[turn] + self.std[turn] * self.head(hidden.float()).gather(1, turn[:, None])[:, 0]

    @torch.no_grad()
    def set_values(self, episodes, c, size):
        """As critic c, append V(h_t) to turn.values of all turns; each rank its shard, `size` rows at a time."""
        rows = [(turn.critic_inputs[c], t, turn) for e in episodes for t, turn in enumerate(e.turns)]
        rows.sort(key=lambda row: row[:2])  # common prefixes are neighbours
        own, values = shard(rows), []
        for k in range(0, len(own), size):
            inputs, turns, _ = zip(*own[k:k + size])
            values += self(inputs, turns).tolist()
        for (_, _, turn), value in zip(rows, all_gather(values)):
            turn.values.append(value)
