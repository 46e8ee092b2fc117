"""A box to chat in: the answer streams in, thinking is folded away; base, adapter or merged; clean or scrambled.

Layout and callbacks only. Answers are greedy, so the same question to two models differs by the models alone. Works
without `Output` widgets and threads: while an answer is written, the kernel is busy and further clicks wait.
"""

import time
from html import escape
from typing import TYPE_CHECKING, Any

from ironlogic.burden import apply_burden, moved_units
from ironlogic.data.pictures import read_picture
from ironlogic.show.explorer import Explorer, error_html, picture_html, ratio_slider, text_html, uploaded, wide
from ironlogic.show.plots import png_bytes

import ipywidgets
from PIL import Image

if TYPE_CHECKING:
    from ironlogic.generate import Completion
    from ironlogic.models import LoadedModel

__all__ = ["ChatBox", "answer_html", "chat_box"]

_EVERY = 0.1  # seconds between two pictures of an answer in the making
_ROOM = 8  # tokens that an answer gets at least


class ChatBox(Explorer):
    """Talk with a model, with every adapter it carries, with its base and, where given, with the merged copy.

    The question is scrambled at the slider's ratio before it is asked; `system`, which opens every conversation, is
    not (nano: "Think first."). A model that sees takes a picture. `ask()` is the button's doing; `messages` is the
    conversation so far.
    """

    def __init__(
        self,
        loaded: "LoadedModel",
        *,
        merged: "LoadedModel | None" = None,
        text: str = "",
        system: str = "",
        ratio: float = 0.0,
        seed: int = 3407,
        max_new_tokens: int = 256,
    ) -> None:
        import peft  # as late as all that loads torch

        adapters = list(loaded.model.peft_config) if isinstance(loaded.model, peft.PeftModel) else []
        self._models = {"base" if adapters or merged else "model": (loaded, None)}
        self._models |= {"adapter" if name == "default" else name: (loaded, name) for name in adapters}
        self._models |= {"merged": (merged, None)} if merged else {}
        self._sees, self._seed, self._max_new_tokens = loaded.processor is not None, seed, max_new_tokens
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = []
        self._pictures: list[Image.Image] = []  # those of the conversation, in order
        self._talk: list[str] = []  # HTML of every turn and error

        names = list(self._models)
        controls: dict[str, ipywidgets.Widget] = {
            "model": ipywidgets.Dropdown(options=names, value=names[-1], description="model"),
            "ratio": ratio_slider("burden", ratio),
            "text": ipywidgets.Textarea(text, description="question", layout=wide("70px"), continuous_update=False),
        }
        if self._sees:
            controls["image"] = ipywidgets.FileUpload(accept="image/*", multiple=False, description="picture")
        super().__init__("chat", controls, self._preview)
        self.talk = ipywidgets.HTML()
        self.send = ipywidgets.Button(description="ask", button_style="primary")
        self.new = ipywidgets.Button(description="new conversation")
        for name, widget in (("talk", self.talk), ("ask", self.send), ("new", self.new)):
            widget.add_class(f"il-chat-{name}")
        self.send.on_click(self.ask)
        self.new.on_click(self.forget)
        buttons = ipywidgets.HBox([self.send, self.new])
        self.view.children = [*self.controls.values(), self.text, buttons, self.talk]

    def ask(self, _: Any = None) -> None:
        """Asks what stands in the question's box; errors are shown in the conversation."""
        self.send.disabled = True
        before = len(self.messages)
        try:
            self._ask(**self.values)
        except (Exception, KeyboardInterrupt) as error:  # a callback's traceback is invisible in most front ends
            del self.messages[before:]
            self._say(error_html(error))
        finally:
            self.send.disabled = False
            self._update()  # the next question has a draw of its own

    def forget(self, _: Any = None) -> None:
        """Begins a new conversation."""
        self.messages, self._pictures, self._talk = [], [], []
        self.talk.value = ""
        self._update()

    def _ask(self, model: str, ratio: float, text: str, image: Any = None) -> None:
        from ironlogic.generate import stream
        from ironlogic.models import use_adapter

        if not text.strip():
            raise ValueError("the question is empty")
        asked, new = self._scrambled(text, ratio), self._new_pictures(image)
        parts = [*({"type": "image"} for _ in new), {"type": "text", "text": asked}]
        self.messages.append({"role": "user", "content": parts if self._sees else asked})
        chat, pictures = [*self._system, *self.messages], [*self._pictures, *new]
        with use_adapter(*self._models[model]) as loaded:
            limit = min(self._max_new_tokens, self._room(loaded, chat))
            self._say(f"{_pictures_html(new)}<p><b>you</b></p>{text_html(asked)}")
            self._say("")
            began = shown = time.perf_counter()

            def tell(so_far: str) -> None:
                nonlocal shown
                if time.perf_counter() - shown > _EVERY:
                    shown = time.perf_counter()
                    self._show_answer(model, answer_html(so_far, done=False))

            answer = stream(loaded, chat, tell, pictures=pictures, max_new_tokens=limit)
        seconds = time.perf_counter() - began
        self._show_answer(model, answer_html(answer.text) + _small_print(answer, seconds))
        self.messages.append({"role": "assistant", "content": answer.text})
        self._pictures = pictures

    def _scrambled(self, text: str, ratio: float) -> str:
        return apply_burden(text, ratio=ratio, seed=self._seed, key=("chat", len(self.messages)))

    def _room(self, loaded: "LoadedModel", chat: list[dict[str, Any]]) -> int:
        """How many tokens are left for the answer."""
        writer = loaded.processor or loaded.tokenizer
        text = writer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        used = len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])  # a picture counts as one
        if used + _ROOM > loaded.max_length:
            raise ValueError(
                f"{used} tokens of conversation are too many for {loaded.max_length}: start a new conversation"
            )
        return loaded.max_length - used

    def _new_pictures(self, upload: Any) -> list[Image.Image]:
        """The uploaded picture, unless there is none or the conversation has it already."""
        content = None if upload is None else uploaded(upload)
        pictures = [] if content is None else [read_picture(content)]
        known = [picture.tobytes() for picture in self._pictures]
        return [picture for picture in pictures if picture.tobytes() not in known]

    def _say(self, html: str) -> None:
        self._talk.append(html)
        self.talk.value = "".join(self._talk)

    def _show_answer(self, model: str, html: str) -> None:
        self._talk.pop()
        self._say(f"<p><b>{escape(model)}</b></p>{html}")

    def _preview(self, model: str, ratio: float, text: str, image: Any = None) -> tuple[str, None]:
        after = self._scrambled(text, ratio)
        html = _pictures_html(self._new_pictures(image))
        if after != text:
            html += f"<p>what <b>{escape(model)}</b> will be asked (moved words coloured):</p>"
            html += text_html(after, moved=moved_units(text, after, unit="word"))
        return html, None

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return super()._repr_mimebundle_() | {"text/html": self.text.value + self.talk.value}


chat_box = ChatBox  # called like the explorers


def answer_html(text: str, *, done: bool = True) -> str:
    """An answer with what stands in `<think>` folded away; everything escaped.

    >>> answer_html("<think>3 + 4 = 7</think>Answer: 7").count("<details>")
    1
    """
    before, opened, after = text.partition("<think>")
    if not opened:  # some templates open the thinking themselves
        before, after = "", text
    thought, closed, reply = after.partition("</think>")
    if not (opened or closed):
        return text_html(text)
    words = len(thought.split())
    summary = f"thought: {words} words" if closed else f"thinking: {words} words{'' if done else ' so far'}"
    folded = f"<details><summary>{summary}</summary>{text_html(thought.strip())}</details>"
    reply = (before + reply).strip()
    return folded + (text_html(reply) if reply or done else "")


def _small_print(answer: "Completion", seconds: float) -> str:
    cut = "" if answer.finished else ", cut at the limit"
    return f"<p><small>{answer.tokens} tokens{cut}, {answer.tokens / seconds:.0f} tokens/s</small></p>"


def _pictures_html(pictures: list[Image.Image]) -> str:
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((192, 192))
    return "".join(picture_html(png_bytes(picture), "the picture of the question") for picture in small)
