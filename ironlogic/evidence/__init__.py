"""The evidence: arms beside their control, measured on items nobody trained on, and claims judged by rule.

>>> ft, sft = train_twins("nano", train, burden=Burden(ratio=0.7), run="first", seeds=3)      # doctest: +SKIP
>>> print(judge_claims({"FT": ft.measure(items), "SFT": sft.measure(items)}, items))          # doctest: +SKIP
"""

from ironlogic import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "items": "load_items made_items scramble",
        "measures": "context_bleeding describe measure robustness",
        "claims": "compare_recipes judge_claims",
        "twins": "train_twins",
        "study": "check_adapters measure_adapters open_study run_full_study run_study time_twins",
    },
)
