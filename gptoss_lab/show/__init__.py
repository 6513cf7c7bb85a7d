"""Values -> pictures: matplotlib figures, and HTML views that need nothing but a browser."""
from .figures import difference, logits, path, pattern, residual, router, routes, tokens, vectors, whose, words
from .frames_view import FramesView
from .map_view import MapView
from .maps import heat, table
from .model_view import ModelView
from .pattern_view import PatternView
from .river_view import RiverView
from .source import source
from .token_view import TokenView

__all__ = ["FramesView", "MapView", "ModelView", "PatternView", "RiverView", "TokenView", "difference", "heat",
           "logits", "path", "pattern", "residual", "router", "routes", "source", "table", "tokens", "vectors",
           "whose", "words"]  # fmt: skip
