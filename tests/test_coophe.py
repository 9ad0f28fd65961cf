"""coophe: what two answers earn, how functions are found in them, and what happens to those that crash."""
import time

import pytest

import tasks
from tasks import coophe_reward, coophe_rewards, coophe_tests, find_function

ITEM = {"prompt": 'from typing import List\n\n\ndef f(n: int) -> List[int]:\n    """Squares below n, plus one."""\n',
        "entry_point": "f",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(0) == []\n"
                "    assert candidate(2) == [1, 2]\n    assert candidate(2) == [1, 2]\n    assert True, 'unused'\n"
                "    assert candidate(3) == [1, 2, 5]\n    assert candidate(1) == [1]\n"}
AUX = "def aux(n):\n    return n * n"
MAIN = "def f(n: int) -> List[int]:\n    return [aux(i) + 1 for i in range(n)]"
ONE = "def f(n):\n    {}\n    return [i * i + 1 for i in range(n)]"  # needs no aux, and runs a statement first
WHOLE = "def aux(n):\n    return [i * i + 1 for i in range(n)]"  # an aux that does main's work


def judge(aux, main, item=ITEM):
    result = coophe_reward(item, aux, main)
    return pytest.approx(result["reward"], abs=1e-9), result["passed"], result["level"]


def test_the_worked_example_earns_four():
    result = coophe_reward(ITEM, AUX, MAIN)
    assert result == {"reward": pytest.approx(0.4 + 0.6 + 0.5 + 4 / 4 + 0.5 + 1.0, abs=1e-9), "passed": 4, "total": 4,
                      "level": "passed"}


@pytest.mark.parametrize("aux, main, reward, passed, level", [
    ("I do not know.", "Nor do I.", 0.0, 0, "main has no function with a return"),
    (AUX, "Nothing.", 0.4, 0, "main has no function with a return"),
    (AUX, "def f(n):\n    print(aux(n))", 0.4, 0, "main has no function with a return"),
    (AUX, "def f(n):\n    return aux(n", 1.0, 0, "syntax error: '(' was never closed (line 2) in f"),
    ("def aux(n):\n    return n *", MAIN, 1.0, 0, "syntax error: invalid syntax (line 2) in aux"),
    ("def aux(n):\n    n *", MAIN, 0.6, 0, "syntax error: invalid syntax (line 2) in aux"),
    (AUX, "def f(n):\n    return aux(n) + 1", 1.5, 0, "failed: assert candidate(0) == []"),
    (AUX, "def f(n):\n    return [aux(i) + 1 for i in range(min(n, 2))]", 3.75, 3,
     "failed: assert candidate(3) == [1, 2, 5]"),
    (AUX, ONE.format("pass"), 2.5, 4, "main does not use aux"),
    ("no", ONE.format("pass"), 2.1, 4, "aux has no function with a return"),
    ("no", MAIN, 1.1 + 0.25, 1, "aux has no function with a return"),  # [] needs no aux; an aux that is missing cannot be used
    ("def aux(n):\n    print(n)", ONE.format("x = aux(n)"), 2.1 + 1.5, 4, "aux has no function with a return"),
    (AUX, ONE.format("aux(n)"), 3.5, 4, "passed"),
    (WHOLE, 'def f(n):\n    """Doc."""\n    return aux(n)', 3.0, 4, "passed"),
    (WHOLE, "def f(n):\n    x = aux(n)\n    return x", 3.0, 4, "passed"),
    (WHOLE, "def f(n):\n    x: list = aux(n)\n    return x", 3.0, 4, "passed"),
    (WHOLE, "def f(n):\n    y = []\n    x = aux(n)\n    return x", 4.0, 4, "passed"),
    (AUX, "def f(n, y=[]):\n    x = aux(n)\n    return y", 3.25, 1, "failed: assert candidate(2) == [1, 2]"),
    (AUX, ONE.format("if n < 0: n.aux(n)"), 2.5, 4, "main does not use aux"),
    (WHOLE, "def f(n):\n    return list(aux(n))", 4.0, 4, "passed"),
    (WHOLE, "def f(n):\n    aux(n)\n    return aux(n)", 3.5, 4, "passed"),
])
def test_each_rule(aux, main, reward, passed, level):
    assert judge(aux, main) == (reward, passed, level)


def test_one_answer_for_both_and_imports_of_the_prompt():
    assert judge(*[f"```python\n{AUX}\n\n{MAIN}\n```"] * 2)[0] == 4.0
    assert judge(AUX, MAIN, ITEM | {"prompt": "def f(n):\n"})[1] == 0  # List is unknown: the module does not load
    assert judge(AUX, ONE.format("re.I"), ITEM | {"prompt": "import re\ndef f(n):\n"})[1] == 4
    half = ITEM | {"prompt": "Imports:\nfrom typing import (List,\n    Dict)\n"}  # with it the module does not parse
    assert judge(AUX, MAIN, half)[:2] == (1.0, 0) and judge(AUX, MAIN, half)[2].startswith("syntax error: ")


@pytest.mark.parametrize("text, source", [
    ("Sure!\n```python\ndef aux(n):\n    return 1\n```\nOr\n```\ndef aux(n):\n    return 2\n```",
     "def aux(n):\n    return 1"),
    ("def aux(n): return 0\n```\ndef aux(n): return 1\n```", "def aux(n): return 1"),
    ("```\nx = 1\n```\ndef aux(n): return 0\n```\ndef aux(n): return 1\n```", "def aux(n): return 1"),
    ("1. So:\n   ```python\n   def aux(n):\n       return 1\n   ```", "def aux(n):\n    return 1"),
    ("```python\ndef aux(n):\n    return 1", "def aux(n):\n    return 1"),
    ("```python\nx = 1\n```\ndef aux(n):\n    return 1\n\nThis is it.", "def aux(n):\n    return 1"),
    ("def aux(\n    n,\n) -> int:\n\n    return 1\nThat's it.", "def aux(\n    n,\n) -> int:\n\n    return 1"),
    ("@cache\ndef aux(n):\n    return 1\n\ndef f(n):\n    return aux(n)", "@cache\ndef aux(n):\n    return 1"),
    ('def aux(n):\n    """\nLeft.\n"""\n    return 1\nx = 1', 'def aux(n):\n    """\nLeft.\n"""\n    return 1'),
    ("def aux(n):\r\n    return 1\r\nDone!", "def aux(n):\n    return 1"),
    ("class A:\n    def aux(self):\n        return 1", ""), ("def auxiliary(n):\n    return 1", "")])
def test_functions_are_found_in_anything(text, source):
    assert find_function(text, "aux")[0] == source


@pytest.mark.parametrize("body, returns", [
    ("def g():\n        return 1\n    print(g)", False), ("return", True), ("yield 1", False),
    ("for i in n:\n        if i:\n            return i", True), ("'return'", False), ("return (", True),
    ("def g():\n        return 1\n    return g", True), ("x = (", False), ("returned = (", False)])
def test_a_return_of_its_own(body, returns):
    assert find_function(f"def aux(n):\n    {body}", "aux")[3] is returns


def test_tests_are_one_line_asserts_or_the_whole_check():
    assert coophe_tests(ITEM["test"]) == ["assert candidate(0) == []", "assert candidate(2) == [1, 2]",
                                          "assert candidate(3) == [1, 2, 5]", "assert candidate(1) == [1]"]
    assert coophe_tests('def check(candidate):\n    """Doc."""\n    # why\n    assert candidate(1)  # so\n    pass\n') \
        == ["assert candidate(1)  # so"]
    for body in ["for i in range(3):\n        assert len(candidate(i)) == i",
                 "x = 2\n    assert candidate(x) == [1, 2]", "assert candidate(2) == [1,\n        2]",
                 "import math\n    assert candidate(int(math.sqrt(4))) == [1, 2]"]:
        item = ITEM | {"test": f"def check(candidate):\n    {body}\n    assert candidate(1) == [1]\n"}
        assert len(coophe_tests(item["test"])) == 1
        assert judge(AUX, MAIN, item) == (4.0, 1, "passed")
        reward, passed, level = judge(AUX, "def f(n):\n    return aux(n)", item)
        assert (reward, passed) == (1.5, 0) and level.startswith("failed: def check(candidate): ") and len(level) <= 200
    beside = "import math\nTWO = 2\ndef check(candidate):\n    assert candidate(TWO * math.ceil(.5)) == [1, 2]"
    assert judge(AUX, MAIN, ITEM | {"test": beside}) == (4.0, 1, "passed")  # defined beside check, so it is there when check runs


def test_helpers_of_the_prompt_a_call_of_check_and_any_line_breaks():
    item = ITEM | {"prompt": "def twice(n):\n    return 2 * n\n\ndef f(n):\n    \"\"\"Do.\"\"\"\n",
                   "test": "def check(candidate):\r    assert candidate(0) == [twice(0)]\r\rcheck(f)\r"}
    assert judge("def aux(n):\n    return [n]", "def f(n):\n    x = aux(n)\n    return x + []", item) == (4.0, 1, "passed")
    for before in ("", "Two tries.\n"):  # the last definition counts, in Python and in prose
        assert judge(AUX, f"{before}def f(n):\n    return 1\n\n{MAIN}") == (4.0, 4, "passed")
    assert judge(f"```{AUX}\n```", "".join(f"    {line}\n" for line in MAIN.split("\n"))) == (4.0, 4, "passed")
    assert coophe_tests("def check(candidate): assert candidate(1) == [1]") == [
        "assert candidate(1) == [1]"]


@pytest.mark.parametrize("prompt", ["TWO = 2\ndef f(n):", "def f(n):\n    pass\nTWO = 2"])
def test_what_a_prompt_holds_beside_the_function_is_there(prompt):
    """Also where the signature has no body or does not come last; but an aux in the prompt does not count."""
    item = {"prompt": prompt, "entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == TWO\n"}
    assert judge(AUX, "def f(n):\n    return aux(n) + 1", item) == (4.0, 1, "passed")
    item["prompt"] = AUX + "\n" + prompt
    assert judge("no", "def f(n):\n    return aux(n) + 1", item)[:2] == (1.1, 0)


@pytest.mark.parametrize("test", ["x = 1", "def check(candidate):\n    assert True", "def check(candidate):\n    pass",
                                  "def check(candidate:", "def check(candidate):\n    for i in []:\n        pass"])
def test_a_problem_without_tests_is_refused(test):
    with pytest.raises(ValueError, match="asserts that name candidate"):
        coophe_reward(ITEM | {"test": test}, AUX, MAIN)


@pytest.mark.parametrize("first", [
    "import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit(0)", "raise KeyboardInterrupt", "f(n)",
    "raise MemoryError", "x = bytes(3 << 30)", "import ctypes; ctypes.string_at(0)", "import os; os.abort()",
    "import os; os.kill(os.getpid(), 9); os._exit(0)", "input()", "open('big', 'w').write('x' * 10 ** 7)",
    "import os; [os.fork() for _ in range(4)]; os._exit(0)",
    "import os; os.closerange(0, 999)", "import os; os.write(1, b'0 1111\\n' * 9); os._exit(0)"])
def test_what_crashes_fails_and_its_neighbours_do_not(first):
    """The first answer does it in every test, the second in the test with n = 2 only, the third is fine."""
    results = coophe_rewards([(ITEM, AUX, ONE.format(first)), (ITEM, AUX, ONE.format(f"if n == 2: {first}")),
                              (ITEM, AUX, MAIN)])
    assert results[0]["passed"] == 0 and results[2]["passed"] == 4 and results[1]["passed"] == 3


def test_an_answer_runs_isolated_and_sees_no_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    alone = "import os, sys; assert 'A_SECRET' not in os.environ and sys.flags.isolated and sys.flags.no_site"
    assert judge(AUX, ONE.format(alone))[1] == 4


def test_all_tests_of_a_pair_share_a_time_limit(monkeypatch):
    monkeypatch.setattr(tasks, "TIME_LIMITS", (9.0, 1.5))
    assert judge(AUX, ONE.format("import time; time.sleep(2 * n)"))[1] == 1  # n is 0, 2, 3, 1: tests passed in time count


def test_a_module_that_does_not_load_passes_nothing_and_output_goes_nowhere(capfd):
    assert judge(AUX, f"@undefined\n{MAIN}") == (1.5, 0, "failed: assert candidate(0) == []")
    assert judge(AUX, ONE.format("print('x' * 10 ** 7)"))[1] == 4
    assert judge(AUX, ONE.format("f.calls = getattr(f, 'calls', 0) + 1; assert f.calls == 1"))[1] == 4  # loaded anew for each test
    assert judge(AUX, ONE.format("import os; assert n or not os.listdir('.'); open('x', 'w').close()"))[1] == 4
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("junk", [
    "\0", "\0" * 100_000, "x" * 100_000, "(" * 90_000, "[" * 50_000 + "]" * 50_000, "-" * 90_000 + "1",
    "1+" * 50_000 + "1", "lambda:" * 14_000 + "1", "not " * 25_000 + "1", "9" * 10_000, "f'{" * 30_000,
    "a" + ".b" * 50_000, '"\\d\ud800"', "a" + "()" * 50_000, "```" * 33_000, "@a\n" * 33_000, "\n" * 100_000,
    "\n".join(" " * i + "if 1:" for i in range(4, 440))])
def test_no_answer_stops_the_trainer(junk):
    for aux, main in ((junk, junk), (f"def aux(n):\n    return {junk}", f"def f(n):\n    return aux(n) and {junk}"),
                      (AUX, f"{junk}\n```\n{MAIN}\n```"), (AUX, f"{MAIN}\n{junk}")):
        result = coophe_reward(ITEM, aux, main)
        assert 0 <= result["reward"] <= 4 and result["total"] == 4 and len(result["level"]) < 300


def test_a_batch_equals_each_alone():
    pairs = [(AUX, MAIN), ("", MAIN), (AUX, ""), (WHOLE, "def f(n):\n    return aux(n)"), (AUX, ONE.format("aux(")),
             (AUX, ONE.format("1 / n")), (AUX, ONE.format("import os; n == 3 and os._exit(0)"))]
    triples = [(ITEM, *pair) for pair in pairs] * 2
    assert coophe_rewards(triples) == [coophe_reward(*triple) for triple in triples]
    assert coophe_rewards([]) == []


@pytest.mark.parametrize("before", ["import re\n", "from __future__ import annotations\nimport re\n", "Sure!\nfrom old import\nimport re\n",
                                    "import no_such\n```\nimport re\n", "```python\nimport re\n\n"])
def test_imports_beside_a_function_are_kept_and_math_is_there(before):
    after = "\n```" * ("```" in before)
    assert judge(AUX, before + ONE.format("re.I, math.pi") + after)[1] == 4
    assert judge(before + AUX.replace("n *", "re.I and n *") + after, MAIN) == (4.0, 4, "passed")
    assert judge(AUX, ONE.format("re.I"))[1] == 0


def test_an_answer_may_not_be_endless():
    start, long = time.perf_counter(), "x = [" + "1, " * 700_000 + "]\n"
    assert judge(AUX, long + MAIN) == (0.4, 0, "main has no function with a return")
    reward, _, level = judge(long + AUX, MAIN)
    assert reward == 0.6 and level == "syntax error: an answer of more than 20000 characters is not read"
    assert time.perf_counter() - start < 2
