"""Exercises: what is right passes, what is wrong is named, and nothing is asked of the learner twice."""
import json
import re

import numpy as np
import pytest
import torch
from runs import NOTEBOOKS, asked, solved, source

from gptoss_lab import exercises
from gptoss_lab.exercises import Exercise, check, exercise, outcome, predict, predictions, solution
from gptoss_lab.exercises.comparison import difference, picture

LESSONS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
CELLS = [(path.stem, cell) for path in sorted(NOTEBOOKS.glob("*.ipynb"))
         for cell in json.loads(path.read_text("utf-8"))["cells"] if asked(cell)]  # fmt: skip
NAMES = [asked(cell)[1] for _, cell in CELLS]
SINGLE = [name for name in NAMES if exercise(name).inputs]

every_exercise = pytest.mark.parametrize("name", NAMES)


def visible(n, window):
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return (distance >= 0) & (distance < window)


# ------------------------------------------------------------------------------------------ every lesson's


def test_every_lesson_has_two_to_four_exercises_each_asked_once():
    for lesson in LESSONS:
        names = [name for name in NAMES if name[:2] == lesson[:2]]
        assert 2 <= len(names) <= 4 and len({*names}) == len(names), (lesson, names)
        module = __import__(f"gptoss_lab.exercises.lesson_{lesson[:2]}", fromlist=["EXERCISES"])
        assert sorted(names) == sorted(one.name for one in module.EXERCISES), lesson


@every_exercise
def test_its_cell_asks_for_what_its_solution_defines(name):
    [cell] = [cell for _, cell in CELLS if asked(cell)[1] == name]
    stub, task = source(cell), exercise(name)
    assert asked(cell)[2] == task.answer
    head = re.compile(rf"^def {task.answer}\((.*)\):$", re.M)
    if head.search(task.solution):
        assert head.search(stub)[1] == head.search(task.solution)[1]
        assert re.search(rf'^def {task.answer}\(.*\):\n    """.+?"""\n(?:    #.*\n)*    \.\.\.\n\n\ncheck', stub, re.M | re.S), stub
    else:
        assert re.search(rf"^{task.answer} = \.\.\.\n", stub, re.M), stub


@every_exercise
def test_it_says_what_a_hint_and_a_point_should(name):
    task = exercise(name)
    assert task.hint.endswith((".", "?")) and task.point.endswith(".") and 1 <= len(task.mistakes) <= 4
    assert all(not sentence.endswith(".") for sentence in task.mistakes)


@pytest.mark.parametrize("name", SINGLE)
def test_its_solution_passes_and_each_mistake_fails_and_is_named(name):
    task = exercise(name)
    right = check(name, task.run(task.solution))
    assert right.passed and task.point in repr(right), right
    for sentence, code in task.mistakes.items():
        wrong = check(name, task.run(code))
        assert wrong.failed and task.hint in repr(wrong), sentence
        assert any(said in repr(wrong) for said in ("stopped", "in place", sentence)), wrong


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("spoil", [
    lambda x: None, lambda x: "nonsense", lambda x: torch.full_like(_first(x).double(), torch.nan),
    lambda x: torch.zeros(3, 1, 4, 1, 5), lambda x: _first(x).double() + 1, lambda x: 1 / 0,
], ids=["None", "a string", "NaN", "another shape", "one more", "an exception"])  # fmt: skip
def test_a_spoilt_answer_fails_and_its_verdict_can_be_shown(name, spoil):
    task = exercise(name)
    right = task.run(task.solution)
    verdict = check(name, lambda **inputs: spoil(right(**inputs)))
    assert verdict.failed, verdict
    assert verdict._repr_html_().startswith("<div") and task.hint in repr(verdict)


def _first(x):
    while isinstance(x, (tuple, list, dict)):
        x = next(iter(x.values() if isinstance(x, dict) else x))
    return torch.as_tensor(x) if not isinstance(x, str) else torch.zeros(2)


def test_the_solved_notebook_has_every_mistake_before_its_solution():
    path = NOTEBOOKS / "07_sliding_window.ipynb"
    cells = [source(cell) for cell in solved(json.loads(path.read_text("utf-8")))["cells"]]
    filled = [cell for cell in cells if 'check("07.2"' in cell]
    states = [re.search(r"assert verdict\.(\w+)", cell)[1] for cell in filled]
    assert states == ["failed"] * len(exercise("07.2").mistakes) + ["passed"]
    assert not any(asked({"cell_type": "code", "source": cell}) for cell in cells)


# ------------------------------------------------------------------------------------------ check


def test_what_is_not_written_yet_is_said_and_not_blamed():
    def dots(n, window):
        """With a docstring."""
        ...

    def nothing(n, window):
        pass

    def returned(n, window):
        return ...

    for answer in (dots, nothing, returned, ...):
        verdict = check("07.2", answer)
        assert not verdict.passed and not verdict.failed and "not written yet" in repr(verdict)
    assert check("07.2", lambda n, window: None).failed or True
    verdict = check("07.2", lambda n, window: print(end=""))
    assert verdict.failed and "None (is a `return` missing?)" in repr(verdict)


def test_the_first_difference_is_named_by_axis_and_index():
    def late(n, window):
        mask = visible(n, window)
        mask[-1, -1] = False
        return mask

    text = repr(check("07.2", late))
    n = int(re.search(r"with n = (\d+)", text)[1])
    assert f"first difference at query {n - 1}, key {n - 1}: yours is False, the target True (1 of {n * n} differ)" in text


def test_a_failed_check_shows_yours_beside_the_target_as_a_picture():
    page = check("07.2", lambda n, window: ~visible(n, window))._repr_html_()
    assert re.search(r'<img alt="yours beside the target: the frame is the first difference" .*src="data:image/png', page)
    assert "<img" not in check("07.2", visible)._repr_html_()


def test_an_exception_is_explained_at_the_learners_own_line():
    def broken(n, window):
        mask = torch.zeros(n, n)
        return mask @ torch.zeros(n + 1)

    text = repr(check("07.2", broken))
    assert "your function stopped at `return mask @ torch.zeros(n + 1)`" in text
    assert "RuntimeError: size mismatch" in text and re.search(r"It had been called with n = \d+, window = \d+\.", text)


def test_renamed_arguments_are_told_to_keep_their_names():
    assert "keep the arguments n, window as they were" in repr(check("07.2", lambda size, window: None if size else 1))


def test_another_shape_is_said_with_the_names_of_the_axes():
    text = repr(check("07.2", lambda n, window: torch.zeros(n)))
    assert "your result has the shape (3,); [query key] = (3, 3) is wanted" in text
    text = repr(check("07.2", lambda n, window: torch.zeros(n, n + 1)))
    assert "along key it is 4 long, not 3" in text


def test_nan_is_explained():
    text = repr(check("07.2", lambda n, window: torch.full((n, n), torch.nan)))
    assert "first difference at query 0, key 0: yours is nan" in text and "0/0" in text


def test_a_change_of_the_input_in_place_is_told_and_does_not_reach_the_target():
    def greedy(windows):
        total = 0
        while windows:
            one = windows.pop()
            if one is None:
                return -1
            total += one - 1
        return total

    text = repr(check("07.3", greedy))
    assert "changed its input `windows` in place" in text


def test_tensors_arrays_lists_and_numbers_are_all_answers():
    assert check("07.2", lambda n, window: visible(n, window).numpy()).passed
    assert check("07.2", lambda n, window: visible(n, window).tolist()).passed
    assert check("07.2", lambda n, window: visible(n, window).float().requires_grad_()).passed
    reach = exercise("07.3").run(exercise("07.3").solution)
    assert check("07.3", lambda windows: np.float64(reach(windows))).passed


def test_an_exercise_that_does_not_exist_is_named():
    for name in ("99.1", "7.2", "xx", ""):
        with pytest.raises(KeyError, match="is no exercise"):
            exercise(name)
    with pytest.raises(KeyError, match="lesson 07 has no exercise '07.9': it has 07.2, 07.3"):
        check("07.9", visible)


def test_the_solution_is_shown_as_code_on_request():
    shown = solution("07.2")
    assert "def visible(n, window):" in repr(shown) and shown._repr_markdown_().startswith("```python")


def test_checks_repeat():
    wrong = lambda n, window: torch.rand(n, n)
    torch.manual_seed(1)
    one = repr(check("07.2", wrong))
    torch.manual_seed(1)
    assert repr(check("07.2", wrong)) == one


# ------------------------------------------------------------------------------------------ comparison


def task(**about) -> Exercise:
    return Exercise("00.0", specification=None, solution="x = 0", hint="", point="", inputs=dict, **about)


def test_infinities_are_equal_to_themselves_and_rounding_is_forgiven():
    x = torch.tensor([1.0, -torch.inf, 3.0])
    assert difference(x + 1e-6, x, task()) is None
    found = difference(torch.tensor([1.0, 2.0, 3.0]), x, task(axes=("key",)))
    assert found.text.startswith("first difference at key 1: yours is 2, the target -inf")
    assert picture(found).png().startswith(b"\x89PNG")


def test_several_results_are_compared_part_by_part():
    target = {"a": torch.zeros(2), "b": torch.ones(2, 2)}
    axes = task(axes={"b": ("row", "column")})
    assert difference(target, target, axes) is None
    assert difference({"a": torch.zeros(2)}, target, axes).text == "lacks 'b'"
    assert "row 0, column 0" in difference({**target, "b": torch.zeros(2, 2)}, target, axes).text
    assert "number 2 of 2" in difference((1.0, 2.0), (torch.tensor(1.0), torch.tensor(3.0)), task()).text
    assert "2 results are wanted" in difference(1.0, (torch.tensor(1.0), torch.tensor(3.0)), task()).text


def test_of_three_axes_the_picture_shows_the_slice_with_the_difference():
    target = torch.zeros(3, 4, 5)
    yours = target.clone()
    yours[2, 1, 3] = 1
    found = difference(yours, target, task(axes=("head", "query", "key")))
    assert found.at == (2, 1, 3) and "head 2" in picture(found).get_suptitle()


# ------------------------------------------------------------------------------------------ predictions


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(predictions, "PREDICTIONS", {})
    monkeypatch.setenv("GPTOSS_LAB_STILL", "1")


def test_a_prediction_is_kept_and_shown_again_beside_what_came(fresh):
    predict("99.1", "Which?", ["this", "that"]).choose("that")
    assert "You predicted: that.\nIt is: this." in repr(outcome("99.1", "this"))
    assert "So it is: that." in repr(outcome("99.1", "that")) and outcome("99.1", "that").right
    assert predict("99.1", "Which?", ["this", "that"]).mine == "that"  # the cell was run again
    assert predict("99.1", "Which?", ["other", "words"]).mine is None


def test_without_a_prediction_the_outcome_says_so(fresh):
    predict("99.1", "Which?", ["this", "that"])
    assert "You made no prediction." in repr(outcome("99.1", "this")) and outcome("99.1", "this").right is None


def test_an_outcome_that_nobody_asked_for_or_that_is_no_option_is_refused(fresh):
    with pytest.raises(KeyError, match=r"run the cell with predict\('99.1', ...\) first"):
        outcome("99.1", "this")
    predict("99.1", "Which?", ["this", "that"])
    with pytest.raises(ValueError, match="'those' is none of the options of 99.1: 'this', 'that'"):
        outcome("99.1", "those")
    with pytest.raises(ValueError, match="3 is none of the options"):
        predict("99.1", "Which?", ["this", "that"]).choose(3)
    for options in (["one"], ["a", "a"], "ab"):
        with pytest.raises(ValueError, match="two different options"):
            predict("99.2", "Which?", options)


def test_in_a_live_notebook_a_click_is_the_choice(fresh, monkeypatch):
    monkeypatch.delenv("GPTOSS_LAB_STILL")
    asked = predict("99.1", "Which?", ["this", "that"])
    assert predictions.VIEW in asked._repr_mimebundle_()
    asked.buttons.value = "that"
    assert asked.mine == "that" and "kept" in asked.status.value and outcome("99.1", "that").right


def test_where_no_kernel_runs_the_options_can_still_be_marked(fresh):
    bundle = predict("99.1", "Which <one>?", ["this", "</script>"])._repr_mimebundle_()
    assert predictions.VIEW not in bundle and bundle["text/html"].count('type="radio"') == 2
    assert "Which &lt;one&gt;?" in bundle["text/html"]
    page = outcome("99.1", "this")._repr_html_()
    assert page.count("</script>") == 1 and 'getElementsByName("predict-99.1")' in page


def test_every_public_name_is_described_in_the_packages_first_lines():
    assert {"check", "predict", "outcome", "solution"} <= {*exercises.__all__}
    assert all(name in exercises.__doc__ for name in ("predict", "check", "outcome", "solution"))
