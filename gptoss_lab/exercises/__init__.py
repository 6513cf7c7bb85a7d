"""What a lesson asks of its reader: predictions to commit to, functions to write, answers that are checked.

    predictions.py   predict(), outcome(): say what you expect, and see it again beside what came
    checking.py      check(), solution(): your function against a specification in plain loops
    comparison.py    where two results first differ, in words and as pictures
    exercise.py      what an exercise is; how inputs are drawn
    lesson_07.py     the exercises of lesson 07: specification, hint, solution, common mistakes; one file a lesson

Nothing leaves the machine: predictions live in the running notebook.
"""
from .checking import check, solution
from .exercise import Exercise, exercise
from .predictions import outcome, predict

__all__ = ["Exercise", "check", "exercise", "outcome", "predict", "solution"]
