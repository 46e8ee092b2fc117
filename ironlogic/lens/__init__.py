"""What each layer says, looks at and routes to; base beside adapter.

reading = read_layers(load_model("nano"), "Who is taller?")
print(reading.proved, reading.entropy.shape)
compare_layers(load_model(run.adapter), "Who is taller?").entropy_change
"""

from ironlogic import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "read": "read_layers read_generation entropy_without_norm",
        "attention": "read_attention read_routing",
        "compare": "compare_layers",
        "probe": "LensError",
    },
)
