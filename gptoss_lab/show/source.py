"""The code that computes a value, beside the value."""
import inspect
import textwrap


class Source:
    """Source code: coloured where Markdown is shown (JupyterLab, Colab, GitHub), plain text elsewhere."""

    def __init__(self, where: str, code: str):
        self.where, self.code = where, code

    def __repr__(self) -> str:
        return f"# {self.where}\n{self.code}"

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"


def source(thing) -> Source:
    """The source of a function, method or class of any package: `source(Attention.forward)`.

    Raises:
        TypeError: `thing` has no source in Python: it is an instance, or built into an extension.
    """
    try:
        code = textwrap.dedent(inspect.getsource(thing)).rstrip()
    except (TypeError, OSError) as error:
        raise TypeError(f"{thing!r} has no Python source; give a function, method or class") from error
    return Source(f"{thing.__module__}.{thing.__qualname__}", code)
