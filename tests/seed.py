"""The published training script of seed 001, call by call, argument by argument.

    python tests/seed.py MODEL ROWS      prints as JSON what every step saw and what was logged

Unsloth has to be imported before TRL, so it gets a process of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any


def seed_trainer(folder: Path, rows: Path, *, length: int = 4096, template: str = "gemma-3", **changed: Any) -> Any:
    """The trainer on the model of a folder and a file of `messages`; `changed` overrides its SFTConfig.

    One word differs: the trainer gets the processor's tokenizer, which Unsloth's CPU back end returns at once.
    """
    from unsloth import FastLanguageModel, get_chat_template

    # isort: split
    import torch
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    model, processor = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=length,
        dtype=None,
        load_in_4bit=True,
        full_finetuning=False,
        local_files_only=True,
        use_gradient_checkpointing="unsloth",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    processor = get_chat_template(processor, template) if template else processor

    def as_text(examples):
        chats = examples["messages"]
        return {
            "text": [processor.apply_chat_template(c, tokenize=False, add_generation_prompt=False) for c in chats]
        }

    dataset = load_dataset("json", data_files=str(rows), split="train")
    dataset = dataset.map(as_text, batched=True, remove_columns=dataset.column_names, load_from_cache_file=False)
    settings = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 25,
        "num_train_epochs": 3,
        "learning_rate": 2e-5,
        "fp16": not torch.cuda.is_bf16_supported(),
        "bf16": torch.cuda.is_bf16_supported(),
        "logging_steps": 5,
        "optim": "paged_adamw_8bit",
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "seed": 3407,
        "output_dir": str(folder / "output"),
        "report_to": "none",
    }
    return SFTTrainer(
        model=model,
        processing_class=getattr(processor, "tokenizer", processor),
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=length,
        dataset_num_proc=1,
        packing=False,
        args=SFTConfig(**settings | changed),
    )


if __name__ == "__main__":
    trainer = seed_trainer(*map(Path, sys.argv[1:]))
    seen, step = [], trainer.training_step

    def spy(model, inputs, *rest):
        seen.append(inputs["input_ids"][0].tolist())
        return step(model, inputs, *rest)

    trainer.training_step = spy
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    print(
        json.dumps({"ids": seen, **{name: [line[name] for line in logged] for name in ("loss", "learning_rate")}})
    )
