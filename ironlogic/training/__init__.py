"""Stages of training and the folders they write.

run = train_sft(load_model("nano"), chats, PRESETS["nano"].train, run="my-first", burden=Burden(ratio=0.7))
run = open_run("my-first")  # later, and elsewhere
model = run.load_model()
"""

from ironlogic import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "runs": "Run RunError open_run",
        "sft": "train_sft",
        "prepared": "prepare_sft train_prepared",
        "grpo": "GrpoError GrpoSettings Samples read_completions rejection_sampling sample_answers train_grpo",
        "parallel": "run_parallel",
    },
)
