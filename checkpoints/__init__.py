"""Model folders to prepared host buffers: Hugging Face safetensors, or the Orbax checkpoint that ``convert`` writes.

- ``source``: safetensors files by memory map;
- ``plan``: which rows of which tensors make up each buffer; ``assemble`` carries it out;
- ``prepared``: the converted folder; ``store``: its Orbax checkpoint;
- ``prepare``: loads either kind of folder.
"""

from checkpoints.assemble import row_range
from checkpoints.prepare import load_weights
from checkpoints.prepared import PreparedInfo, convert, prepared_info
from checkpoints.progress import Progress

__all__ = ["PreparedInfo", "Progress", "convert", "load_weights", "prepared_info", "row_range"]
