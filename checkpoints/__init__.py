"""Model folders to prepared host buffers: Hugging Face safetensors, or the Orbax checkpoint that ``convert`` writes.

- ``source``: safetensors files by memory map;
- ``plan``: which rows of which tensors make up each buffer; ``assemble`` carries it out;
- ``model_folder``: what kind of folder it is, and whether its head is its own;
- ``prepared``: the converted folder, described by ``prepared_info``; ``store``: its Orbax checkpoint;
- ``prepare``: loads either kind of folder.
"""

from checkpoints.assemble import row_range
from checkpoints.model_folder import read_model
from checkpoints.prepare import load_weights
from checkpoints.prepared import convert
from checkpoints.prepared_info import PreparedInfo, prepared_info
from checkpoints.progress import Progress

__all__ = ["PreparedInfo", "Progress", "convert", "load_weights", "prepared_info", "read_model", "row_range"]
