"""Iron Logic: a single-GPU notebook workbench for Fragmented Training, with the controls.

Nothing heavy is imported here: `session.start` has to run before torch, transformers or Unsloth are loaded.
"""

__version__ = "0.1.0.dev0"
