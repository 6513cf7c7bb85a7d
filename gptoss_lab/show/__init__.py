"""Values -> pictures: matplotlib figures, and one HTML view that needs nothing but a browser."""
from .figures import difference, logits, path, pattern, residual, router, routes, tokens, vectors, words
from .pattern_view import PatternView
from .source import source

__all__ = ["PatternView", "difference", "logits", "path", "pattern", "residual", "router", "routes", "source",
           "tokens", "vectors", "words"]  # fmt: skip
