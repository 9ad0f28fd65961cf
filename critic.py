"""
The critic estimates the value of a history: its own LoRA adapter on the shared frozen base, and a linear value head.

V(h) is computed from the last token's hidden state; no vocabulary logits are computed. CoLLM-CC has one centralized
critic that reads the joint history, CoLLM-DC one critic per agent that reads that agent's own history. Critics are
needed only for training; trained agents work without. The Monte Carlo baselines, which replace a critic, are here, too.
"""
import os

import torch
from torch import nn

from tasks import write_atomic


def td_targets(rewards, values, gamma, lam=0.0):
    """Value targets and advantages of one episode, both lists over turns; the value after the last turn is 0.

    delta_t = r_t + gamma V(h_t+1) - V(h_t);  A_t = delta_t + gamma lam A_t+1;  target_t = A_t + V(h_t).
    lam = 0 is the paper's one-step TD error, lam = 1 the return minus the value (GAE, arXiv 1506.02438).

    rewards [1, 2], values [0.5, 1.0], gamma 0.9 give targets [1.9, 2.0] and advantages [1.4, 1.0]; with lam 1 and
    gamma 1 the same episode has returns [3, 2] as targets and advantages [2.5, 1.0].
    """
    targets, advantages, next_value, advantage = [], [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values)):
        advantage = reward + gamma * next_value - value + gamma * lam * advantage
        advantages.insert(0, advantage)
        targets.insert(0, advantage + value)
        next_value = value
    return targets, advantages


def explained_variance(returns, values):
    """Share of the returns' variance that the values explain: 1 is perfect, 0 no better than a constant.

    returns [1, 3], values [1.5, 2.5]: the errors [-0.5, 0.5] have variance 0.25, the returns 1, hence 0.75.
    """
    returns, values = torch.tensor(returns, dtype=torch.float32), torch.tensor(values, dtype=torch.float32)
    return 1 - ((returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-9)).item()


def explained_variance_stats(returns, values):
    """Explained variance for the log, over all turns and for each turn; returns and values are [episode][turn].

    [[2, 1], [4, 3]] and [[3, 1.5], [3, 2.5]]: 0 at turn 0, where the values are equal, 0.75 at turn 1, 0.5 in all.
    """
    at_turn = [[(ret[t], value[t]) for ret, value in zip(returns, values) if len(ret) > t]
               for t in range(max(map(len, returns)))]
    return {"value/explained_variance": explained_variance(*zip(*sum(at_turn, []))),
            "value/explained_variance_by_turn": [explained_variance(*zip(*pairs)) for pairs in at_turn]}


def baselines(returns, kind):
    """Monte Carlo baselines for the returns of a group: joint actions on the same item at the same turn.

    [1, 2, 6] give [3, 3, 3] with "group", their mean (MAGRPO; GRPO with one agent), [4, 3.5, 1.5] with "loo", the mean
    of the others, and [0, 0, 0] with "none" (MAREINFORCE). A group of one is its own baseline: [5] gives [5], unless
    the kind is "none".
    """
    total, n = sum(returns), len(returns)
    if kind == "none":
        return [0.0] * n
    return [(total - ret) / (n - 1) if kind == "loo" and n > 1 else total / n for ret in returns]


def critic_messages(histories):
    """The chat that a critic reads: the histories of the agents it serves, joined message by message.

    Text that is the same for every agent appears once, other texts one after another; a single history stays as it is.
    [[user "Build I with A.", ...], [user "Build I with B.", ...]] begins with the single user message
    "Build I with A.\nBuild I with B.". The rules (system messages) are omitted: an agent's rules never change.
    """
    messages = []
    for parallel in zip(*histories):  # one message of each agent
        texts = [message["content"].strip() for message in parallel]
        texts = texts[:1] if len(set(texts)) == 1 else texts
        if parallel[0]["role"] != "system":
            messages.append({"role": parallel[0]["role"], "content": "\n".join(texts)})
    return messages


class Critic(nn.Module):
    """V(h_t) = mean_t + std_t x head_t(last token's hidden state); mean_t and std_t are of the first step's returns.

    The head has one output per turn: the number of turns left determines most of the return, but cannot be inferred
    from a history that keeps only the last answer. It is scaled: a critic that starts at 0 when returns are near -7
    would bootstrap nonsense for the actors until it has caught up.
    """

    def __init__(self, lm, name, num_turns, max_tokens):
        """lm: the LanguageModel that gets its adapter; name: the adapter's; max_tokens: longest input, in tokens."""
        super().__init__()
        self.lm, self.name, self.truncated = [lm], name, 0  # lm in a list, so that it is not a submodule
        self.max_tokens = min(max_tokens, lm.context)
        self.head = nn.Linear(lm.hidden_size, num_turns, device=lm.device)
        self.weights = [*lm.add_adapter(name), *self.head.parameters()]
        nn.init.zeros_(self.head.weight)  # V starts at the mean return
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(num_turns, device=lm.device))
        self.register_buffer("std", torch.ones(num_turns, device=lm.device))

    def input_ids(self, histories):
        """Token ids of the critic's input, truncated on the left to max_tokens; truncations are counted."""
        ids = self.lm[0].render(critic_messages(histories))
        self.truncated += len(ids) > self.max_tokens
        return ids[-self.max_tokens:]

    def set_scale(self, returns):
        """Set mean_t and std_t from returns [episode][turn]: head_t = 0 is then the mean return at turn t."""
        for t in range(len(self.mean)):
            at_t = torch.tensor([ret[t] for ret in returns if len(ret) > t])
            if len(at_t):
                self.mean[t], self.std[t] = at_t.mean(), at_t.std(correction=0).clamp(min=0.1)

    def save(self, out_dir):
        """Save out_dir/NAME/: the adapter in PEFT's format, and value_head.pt with head, mean and std."""
        self.lm[0].save_adapter(self.name, out_dir)
        path = os.path.join(out_dir, self.name, "value_head.pt")
        write_atomic(path, lambda part: torch.save(self.state_dict(), part))

    def forward(self, inputs, turns):
        """V(h_t), on the scale of returns, shape (B,), for B token-id lists and their turn numbers t."""
        hidden = self.lm[0].hidden([self.name] * len(inputs), inputs, [len(ids) - 1 for ids in inputs])  # (B, C)
        turn = torch.tensor(turns, device=hidden.device)
        return self.mean[turn] + self.std[turn] * self.head(hidden.float()).gather(1, turn[:, None])[:, 0]
