"""Eyes for a language model: spliced, proved, trained in two stages, asked about pictures.

model = splice("nano-vision", "nano")                                     # from ironlogic import splice
check_splice(model)                                                       # a row for each thing that can be wrong
one = train_projector(model, captions, settings, run="eyes-1")
two = train_instruct(one.loaded, questions, settings, run="eyes-2")
save_spliced(two, "eyes")                                                 # plain transformers loads it
"""

from ironlogic import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "check": "check_splice",
        "train": "save_spliced train_instruct train_projector",
        "answers": "answer_pictures control_rows",
        "splice": "SpliceError",
    },
)
