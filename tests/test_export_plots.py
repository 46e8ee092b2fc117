"""The figure of exports draws the sizes and divergences that it is given."""

from types import SimpleNamespace

from ironlogic.show.export import plot_exports


def point(kind, reader, mebibytes, mean_kl, tolerance):
    return SimpleNamespace(kind=kind, reader=reader, bytes=mebibytes * 2**20, mean_kl=mean_kl, tolerance=tolerance)


def test_points_bars_and_names():
    rows = [
        point("f32", "transformers", 4, 0.0, 1e-6),
        point("q8_0", "transformers", 1, 3e-4, 1e-2),
        point("q8_0", "llama.cpp", 1, 5e-4, 1e-2),
    ]
    (axes,) = plot_exports(rows).axes
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert drawn["read by transformers"] == [[4.0, 1e-9], [1.0, 3e-4]], "equal is drawn at the floor"
    assert drawn["read by llama.cpp"] == [[1.0, 5e-4]]
    assert drawn["allowed"] == [[4.0, 1e-6], [1.0, 1e-2], [1.0, 1e-2]]
    assert [text.get_text() for text in axes.texts] == ["f32", "q8_0"]
    assert axes.get_yscale() == "log"
