"""Models that leave the workbench: merged weights, GGUF, LoRA files, each compared with its source; a model card.

merged = merge_adapter(run, "exports/merged")
file = export_gguf(merged, "exports", quantization="q8_0")
print(*check_export(file, merged), write_model_card(run, "exports", exports="exports"))
"""

from ironlogic import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "write": "check_export export_gguf export_lora_gguf merge_adapter open_export write_modelfile",
        "gguf": "ExportError",
        "readers": "llama_answers",
        "card": "write_model_card",
    },
)
