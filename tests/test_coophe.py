"""coophe: what two answers earn, how functions are found in them, and what cannot be read (test_coophe_sandbox.py: attacks)."""

import pytest

from tasks import coophe_reward, coophe_rewards

ITEM = {"prompt": 'from typing import List\n\n\ndef f(n: int) -> List[int]:\n    """Squares below n, plus one."""\n',
        "entry_point": "f",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(0) == []\n"
                "    assert candidate(2) == [1, 2]\n    assert candidate(2) == [1, 2]\n    assert True, 'unused'\n"
                "    assert candidate(3) == [1, 2, 5]\n    assert candidate(1) == [1]\n"}
AUX = "def aux(n):\n    return n * n"
MAIN = "def f(n: int) -> List[int]:\n    return [aux(i) + 1 for i in range(n)]"
ONE = "def f(n):\n    {}\n    return [i * i + 1 for i in range(n)]"  # needs no aux, and runs a statement first
WHOLE = "def aux(n):\n    return [i * i + 1 for i in range(n)]"  # an aux that does main's work
LONG = "x = 1\n" * 4000  # it is not read, since to parse millions of characters takes minutes


def passed(*firsts):
    """How many of its 4 tests each answer passes that runs one of these statements first."""
    return [result["passed"] for result in coophe_rewards([(ITEM, AUX, ONE.format(first)) for first in firsts])]


NO_MAIN, NO_AUX, UNUSED = "main has no function with a return", "aux has no function with a return", "main does not use aux"
RULES = [
    (AUX, MAIN, 0.4 + 0.6 + 0.5 + 4 / 4 + 0.5 + 1.0, 4, "passed"), ("I do not know.", "Nor do I.", 0.0, 0, NO_MAIN),
    (AUX, "def f(n):\n    print(aux(n))", 0.4, 0, NO_MAIN), ("def aux(n):\n    n *", MAIN, 0.6, 0, "syntax error"),
    (AUX, "def f(n):\n    return aux(n", 1.0, 0, "syntax error"), ("def aux(n):\n    return n *", MAIN, 1.0, 0, "syntax error"),
    (AUX, "def f(n):\n    return aux(n) + 1", 1.5, 0, "failed: assert candidate(0) == []"),
    (AUX, "def f(n):\n    return [aux(i) + 1 for i in range(min(n, 2))]", 3.75, 3, "failed: assert candidate(3) == [1, 2, 5]"),
    (AUX, f"@undefined\n{MAIN}", 1.5, 0, "failed: assert candidate(0)"),  # a module that does not load passes nothing
    (AUX, ONE.format("pass"), 2.5, 4, UNUSED), (AUX, ONE.format("if n < 0: n.aux(n)"), 2.5, 4, UNUSED),
    ("no", ONE.format("pass"), 2.1, 4, NO_AUX), ("no", MAIN, 1.1 + 0.25, 1, NO_AUX),  # [] needs no aux
    ("def aux(n):\n    print(n)", ONE.format("x = aux(n)"), 2.1 + 1.5, 4, NO_AUX),
    (AUX, ONE.format("aux(n)"), 3.5, 4, "passed"),                                  # its value is ignored
    (WHOLE, 'def f(n):\n    """Doc."""\n    return aux(n)', 3.0, 4, "passed"),      # three thin wrappers
    (WHOLE, "def f(n):\n    x = aux(n)\n    return x", 3.0, 4, "passed"),
    (WHOLE, "def f(n):\n    x: list = aux(n)\n    return x", 3.0, 4, "passed"),
    (WHOLE, "def f(n):\n    y = []\n    x = aux(n)\n    return x", 4.0, 4, "passed"),
    (AUX, "def f(n, y=[]):\n    x = aux(n)\n    return y", 3.25, 1, "failed: assert candidate(2) == [1, 2]"),
    (WHOLE, "def f(n):\n    return list(aux(n))", 4.0, 4, "passed"),
    (WHOLE, "def f(n):\n    aux(n)\n    return aux(n)", 3.5, 4, "passed"),
    (AUX, LONG + MAIN, 0.4, 0, NO_MAIN), (LONG + AUX, MAIN, 0.6, 0, "syntax error: an answer of more than 20000 characters")]


def test_each_rule():
    results = coophe_rewards([(ITEM, aux, main) for aux, main, *_ in RULES])
    for (aux, main, reward, passed, level), result in zip(RULES, results):
        assert (result["reward"], result["passed"]) == (pytest.approx(reward, abs=1e-9), passed), (aux, main)
        assert result["level"].startswith(level) and result["total"] == 4
    assert coophe_rewards([]) == []


def test_functions_are_found_in_anything():
    """The value of each aux; None: there is none."""
    answers = {"Sure!\n```python\ndef aux(n):\n    return 1\n```\nOr\n```\ndef aux(n):\n    return 2\n```": 1,  # the first block
        "def aux(n): return 0\n```\ndef aux(n): return 1\n```": 1, "```\nx = 1\n```\ndef aux(n): return 0\n```\ndef aux(n): return 1\n```": 1,
        "1. So:\n   ```python\n   def aux(n):\n       return 1\n   ```": 1, "```python\ndef aux(n):\n    return 1": 1,
        "```python\nx = 1\n```\ndef aux(n):\n    return 1\n\nThis is it.": 1, "def aux(n):\r\n    return 1\r\nDone!": 1,
        "def aux(\n    n,\n) -> int:\n\n    return 1\nThat's it.": 1, "@len\n@str\ndef aux(n):\n    return 1\nx = 1": None,
        '@staticmethod\ndef aux(n):\n    """\nLeft.\n"""\n    return 1\nx = 1': 1, "    def aux(n):\n        return 1": 1,
        "class A:\n    def aux(self):\n        return 1": None, "def auxiliary(n):\n    return 1": None,
        "def aux(n):\n    return 1\n\ndef aux(n):\n    return 2": 2,  # the last definition, as in Python; also in prose
        "Two tries.\ndef aux(n):\n    return 1\n\ndef aux(n):\n    return 2": 2}
    tests = "def check(candidate):\n    assert candidate() == 1\n    assert candidate() == 2\n"
    item = {"prompt": "", "entry_point": "f", "test": tests}
    for (answer, value), result in zip(answers.items(), coophe_rewards([(item, a, "def f():\n    return aux(0)") for a in answers])):
        assert (result["passed"] and 1 + ("candidate() == 1" in result["level"]) or None) == value, answer  # the level names the failure


def test_a_return_of_its_own():
    """Not one of an inner function, nor the word in a string; also where the function does not parse."""
    own = ["return", "for i in n:\n        if i:\n            return i", "def g():\n        return 1\n    return g", "return ("]
    other = ["def g():\n        return 1\n    print(g)", "yield 1", "'return'", "x = (", "returned = ("]
    for body in own + other:
        assert coophe_reward(ITEM, f"def aux(n):\n    {body}", "")["reward"] == 0.4 * (body in own), body


@pytest.mark.parametrize("body, total", [
    ("assert candidate(1)  # so\n    pass", 1), ("assert candidate(1) == [1]\n    assert True", 1),
    ("for i in range(3):\n        assert len(candidate(i)) == i", 1), ("x = 2\n    assert candidate(x) == [1, 2]", 1),
    ("assert candidate(2) == [1,\n        2]\n    assert candidate(1) == [1]", 1),
    ("import math\n    assert candidate(int(math.sqrt(4))) == [1, 2]\n    assert candidate(1)", 1),
    ('"""Doc."""\n    # why\n    assert candidate(2) == [1, 2]\n    assert candidate(1) == [1]', 2)])
def test_tests_are_one_line_asserts_or_the_whole_check(body, total):
    item = ITEM | {"test": f"def check(candidate):\n    {body}\n\ncheck(f)\n".replace("\n", "\r" if total == 2 else "\n")}
    assert coophe_reward(item, AUX, MAIN) == {"reward": 4.0, "passed": total, "total": total, "level": "passed"}
    wrong = coophe_reward(item, AUX, "def f(n):\n    return []")
    assert wrong["passed"] == 0 and wrong["level"].startswith("failed: ") and len(wrong["level"]) <= 200


def test_what_a_test_or_an_answer_may_use():
    """Imports and helpers of the prompt, names beside check, imports beside a function, and math; but no aux of the prompt."""
    main, test = "def f(n):\n    return aux(n) + 1", "def check(candidate):\n    assert candidate(1) == 2\n"
    example = {"prompt": "def f(n):\n", "entry_point": "f", "test": test + "    assert candidate(2) == 7\n"}  # of the docstring
    cases = [(example, AUX, main, 3.5)]
    for prompt, before in [("TWO = 2\ndef f(n):", ""), ("def f(n):\n    pass\nTWO = 2", ""), ("", "import math\nTWO = math.ceil(1.5)\n")]:
        item = {"prompt": prompt, "entry_point": "f", "test": before + "def check(candidate):\n    assert candidate(1) == TWO\n"}
        cases += [(item, AUX, main, 4.0), (item | {"prompt": f"{AUX}\n{prompt}"}, "no", main, 1.1)]
    cases += [(ITEM | {"prompt": "def f(n):\n"}, AUX, MAIN, 1.5 + 0),  # List is unknown: the module does not load
              (ITEM | {"prompt": "Imports:\nfrom typing import (List,\n    Dict)\n"}, AUX, MAIN, 1.0),  # does not parse
              (ITEM | {"prompt": "import re\ndef f(n):\n"}, AUX, ONE.format("re.I"), 2.5), (ITEM, AUX, ONE.format("re.I"), 1.5),
              (ITEM, *[f"```python\n{AUX}\n\n{MAIN}\n```"] * 2, 4.0)]  # one answer for both
    for before in ["import re\n", "from __future__ import annotations\nimport re\n", "Sure!\nfrom old import\nimport re\n",
                   "import no_such\n```\nimport re\n", "```python\nimport re\n\n"]:
        after = "\n```" * ("```" in before)
        cases += [(ITEM, AUX, before + ONE.format("re.I, math.pi") + after, 2.5),
                  (ITEM, before + AUX.replace("n *", "re.I and n *") + after, MAIN, 4.0)]
    for case, result in zip(cases, coophe_rewards([case[:3] for case in cases])):
        assert result["reward"] == pytest.approx(case[3], abs=1e-9), case


def test_no_answer_stops_the_trainer():
    junk = ["\0", "\0" * 19_000, "x" * 19_000, "(" * 19_000, "[" * 9_000 + "]" * 9_000, "-" * 19_000 + "1", "-" * 90_000 + "1",
            "1+" * 9_000 + "1", "lambda:" * 2_700 + "1", "not " * 4_700 + "1", "9" * 10_000, "f'{" * 6_000, "a" + ".b" * 9_000,
            '"\\d\ud800"', "a" + "()" * 9_000, "```" * 5_000, "@a\n" * 6_000, "\n" * 19_000,
            "\n".join(" " * i + "if 1:" for i in range(4, 190))]
    triples = [(ITEM, text, f"{text}\n```\n{MAIN}\n```") for text in junk]
    triples += [(ITEM, f"def aux(n):\n    return {text}", f"def f(n):\n    return aux(n) and {text}") for text in junk]
    for result in coophe_rewards(triples):
        assert 0 <= result["reward"] <= 4 and result["total"] == 4 and len(result["level"]) < 300
