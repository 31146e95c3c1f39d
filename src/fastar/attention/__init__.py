"""The one seam between backbones and methods: what a pass is, where tokens are, and the state behind `attend`.

The state is imported from `fastar.attention.state`, since it needs the caches, selectors and engines, which need the
rest of this package.
"""

from fastar.attention.context import Attend, PassContext, PassKind, Stream
from fastar.attention.rope import RotaryEmbedding, grid_positions

__all__ = ["Attend", "PassContext", "PassKind", "RotaryEmbedding", "Stream", "grid_positions"]
