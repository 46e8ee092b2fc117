"""Ask about a picture: pick a held-out one or bring your own, type a question, read the answer.

The answer is greedy; the right one is shown where it is known.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ironlogic.data.chats import picture_turn
from ironlogic.data.pictures import read_picture
from ironlogic.show.explorer import Explorer, picture_html, uploaded, wide
from ironlogic.show.plots import png_bytes

import ipywidgets
from PIL import Image

if TYPE_CHECKING:
    from ironlogic.models import LoadedModel

__all__ = ["picture_explorer"]

_SIDE = 192  # pixels at which a picture is shown


def picture_explorer(
    loaded: "LoadedModel", rows: Sequence[Sequence[dict[str, Any]]], *, max_new_tokens: int = 32
) -> Explorer:
    """The last picture and question of each conversation of `rows` that has a picture; or an upload.

    An uploaded picture goes before the picked one, until another is picked. The questions of `rows` are offered,
    any other may be typed.
    """
    from ironlogic.vision.answers import answer_pictures, last_question

    offered = [asked for row in rows if (asked := last_question(row))[0] is not None]
    known = {(i, question): truth for i, (_, question, truth) in enumerate(offered)}
    questions = list(dict.fromkeys(question for _, question, _ in offered))

    def show(picture: int, upload: Any, question: str) -> tuple[str, None]:
        mine = uploaded(upload)
        image = read_picture(mine if mine is not None else offered[picture][0])
        if not question.strip():
            return picture_html(_enlarged(image), "the picture") + "<p>type a question</p>", None
        (answer,) = answer_pictures(loaded, [[picture_turn(image, question)]], max_new_tokens=max_new_tokens)
        truth = known.get((picture, question)) if mine is None else None
        verdict = ""
        if truth is not None:
            verdict = " · right" if answer == truth else f" · the truth: {escape(truth)}"
        reply = f"<p>{escape(question)}<br><b>{escape(answer) or 'no answer'}</b>{verdict}</p>"
        return picture_html(_enlarged(image), "the picture") + reply, None

    numbers = [(f"held-out picture {i + 1}", i) for i in range(len(offered))]
    pick = ipywidgets.Dropdown(options=numbers, value=0, description="picture")
    upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="or your own")
    # before the explorer asks; set_trait, as ipywidgets 7 has it read-only
    pick.observe(lambda _: upload.set_trait("value", type(upload.value)()), names="value")
    typed = ipywidgets.Combobox(
        value=questions[0], options=questions, description="question", continuous_update=False, layout=wide()
    )
    return Explorer("picture", {"picture": pick, "upload": upload, "question": typed}, show)


def _enlarged(image: Image.Image) -> bytes:
    """PNG of the picture, its longer side at 192 pixels; small ones keep their pixels sharp."""
    scale = _SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return png_bytes(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC))
