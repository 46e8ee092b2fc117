"""A box to chat in: the answer streams in, thinking is folded away; base, adapter or merged; clean or scrambled.

Layout and callbacks only. Answers are greedy, so the same question to two models differs by the models alone. Works
without `Output` widgets and threads: while an answer is written, the kernel is busy and further clicks wait.
"""

import contextlib
import io
import time
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from ironlogic.burden import apply_burden, moved_units
from ironlogic.data.pictures import read_picture
from ironlogic.show.explorer import Explorer, picture_html, ratio_slider, text_html, uploaded

import ipywidgets
from PIL import Image

if TYPE_CHECKING:
    from ironlogic.models import LoadedModel

__all__ = ["ChatBox", "answer_html", "chat_box"]

_EVERY = 0.1  # seconds between two pictures of an answer in the making


def chat_box(
    loaded: "LoadedModel",
    *,
    merged: "LoadedModel | None" = None,
    text: str = "",
    system: str = "",
    ratio: float = 0.0,
    seed: int = 3407,
    max_new_tokens: int = 256,
) -> "ChatBox":
    """Talk with a model, with every adapter it carries, with its base and, where given, with the merged copy.

    The question is scrambled at the slider's ratio before it is asked; `system`, which opens every conversation, is
    not (nano: "Think first."). A model that sees takes a picture.
    """
    return ChatBox(loaded, merged, text, system, ratio, seed, max_new_tokens)


class ChatBox(Explorer):
    """The chat of `chat_box`. `ask()` is the button's doing; `messages` is the conversation so far."""

    def __init__(self, loaded, merged, text, system, ratio, seed, max_new_tokens) -> None:
        import peft

        adapters = list(loaded.model.peft_config) if isinstance(loaded.model, peft.PeftModel) else []
        self._models = {"base" if adapters or merged else "model": (loaded, None)}
        self._models |= {"adapter" if name == "default" else name: (loaded, name) for name in adapters}
        self._models |= {"merged": (merged, None)} if merged else {}
        self._carries, self._seed, self._limit = bool(adapters), seed, max_new_tokens
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = []
        self._pictures: list[Image.Image] = []
        self._said: list[str] = []
        wide = ipywidgets.Layout(width="95%", height="70px")
        names = list(self._models)
        controls: dict[str, ipywidgets.Widget] = {
            "model": ipywidgets.Dropdown(options=names, value=names[-1], description="model"),
            "ratio": ratio_slider("burden", ratio),
            "text": ipywidgets.Textarea(value=text, description="question", layout=wide, continuous_update=False),
        }
        if loaded.processor is not None:
            controls["image"] = ipywidgets.FileUpload(accept="image/*", multiple=False, description="picture")
        self.talk = ipywidgets.HTML()
        self.send = ipywidgets.Button(description="ask", button_style="primary")
        self.new = ipywidgets.Button(description="new conversation")
        super().__init__("chat", controls, self._preview)
        for name, widget in (("talk", self.talk), ("ask", self.send), ("new", self.new)):
            widget.add_class(f"il-chat-{name}")
        self.send.on_click(self.ask)
        self.new.on_click(self.forget)
        buttons = ipywidgets.HBox([self.send, self.new])
        self.view.children = [*self.controls.values(), self.text, buttons, self.talk]

    def ask(self, _: Any = None) -> None:
        """Asks what stands in the question's box; errors are shown in the conversation."""
        self.send.disabled = True
        name = self.controls["model"].value
        try:
            before = len(self.messages)
            asked, picture = self._question(), self._new_picture()
            with self._model(name) as loaded:
                answer = self._answer(loaded, name, asked, picture)
            self.messages.append({"role": "assistant", "content": answer})
        except (Exception, KeyboardInterrupt) as error:  # a callback's traceback is invisible in most front ends
            del self.messages[before:]
            self._said.append(f"<pre style='color:#b00020'>{escape(f'{type(error).__name__}: {error}')}</pre>")
            self._show_talk()
        finally:
            self.send.disabled = False
            self._update()  # the next question has a draw of its own

    def forget(self, _: Any = None) -> None:
        """Begins a new conversation."""
        self.messages, self._pictures, self._said = [], [], []
        self.talk.value = ""
        self._update()

    def _question(self) -> str:
        text = self.controls["text"].value
        if not text.strip():
            raise ValueError("the question is empty")
        key = ("chat", len(self.messages))
        return apply_burden(text, ratio=self.controls["ratio"].value, seed=self._seed, key=key)

    @contextlib.contextmanager
    def _model(self, name: str) -> Iterator["LoadedModel"]:
        from ironlogic.models import use_adapter

        loaded, adapter = self._models[name]
        if name == "merged" or not self._carries:
            yield loaded
        else:
            with use_adapter(loaded, adapter) as model:
                yield model

    def _answer(self, loaded: "LoadedModel", name: str, asked: str, picture: Image.Image | None) -> str:
        from ironlogic.generate import stream

        content: Any = asked
        if loaded.processor is not None:
            content = [{"type": "image"}] * (picture is not None) + [{"type": "text", "text": asked}]
        pictures = [*self._pictures, *([picture] if picture else [])]
        self.messages.append({"role": "user", "content": content})
        writer = loaded.processor or loaded.tokenizer
        chat = [*self._opening, *self.messages]
        text = writer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        used = len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])  # a picture counts as one
        if used + 8 > loaded.max_length:
            raise ValueError(
                f"{used} tokens of conversation are too many for {loaded.max_length}: start a new conversation"
            )
        shown = f"{_picture_html(picture) if picture else ''}<p><b>you</b></p>{text_html(asked)}"
        self._said += [shown, ""]
        began = last = time.perf_counter()

        def tell(text: str, *, done: bool = False) -> None:
            nonlocal last
            if done or time.perf_counter() - last > _EVERY:
                last = time.perf_counter()
                self._said[-1] = f"<p><b>{escape(name)}</b></p>{answer_html(text, done=done)}"
                self._show_talk()

        limit = min(self._limit, loaded.max_length - used)
        answer = stream(loaded, chat, tell, pictures=pictures, max_new_tokens=limit)
        tell(answer.text, done=True)
        rate = answer.tokens / (time.perf_counter() - began)
        cut = "" if answer.finished else ", cut at the limit"
        self._said[-1] += f"<p><small>{answer.tokens} tokens{cut}, {rate:.0f} tokens/s</small></p>"
        self._show_talk()
        self._pictures = pictures
        return answer.text

    def _show_talk(self) -> None:
        self.talk.value = "".join(self._said)

    def _preview(self, model: str, ratio: float, text: str, image: Any = None) -> tuple[str, None]:
        after = apply_burden(text, ratio=ratio, seed=self._seed, key=("chat", len(self.messages)))
        picture = self._new_picture()
        html = _picture_html(picture) if picture else ""
        if after != text:
            html += f"<p>what <b>{escape(model)}</b> will be asked (moved words coloured):</p>"
            html += text_html(after, moved=moved_units(text, after, unit="word"))
        return html, None

    def _new_picture(self) -> Image.Image | None:
        """The uploaded picture, unless the conversation has it already."""
        content = uploaded(self.controls["image"].value) if "image" in self.controls else None
        if content is None:
            return None
        picture = read_picture(content)
        return None if any(picture.tobytes() == old.tobytes() for old in self._pictures) else picture

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return super()._repr_mimebundle_() | {"text/html": self.text.value + self.talk.value}


def answer_html(text: str, *, done: bool = True) -> str:
    """An answer with what stands in `<think>` folded away; everything escaped.

    >>> answer_html("<think>3 + 4 = 7</think>Answer: 7").count("<details>")
    1
    """
    head, opened, rest = text.partition("<think>")
    thought, closed, reply = rest.partition("</think>")
    if not opened and "</think>" in text:  # some templates open the thinking themselves
        thought, closed, reply = text.partition("</think>")
        head = ""
    if not (opened or closed):
        return text_html(text)
    words = len(thought.split())
    summary = f"thought: {words} words" if closed else f"thinking: {words} words{'' if done else ' so far'}"
    folded = f"<details><summary>{summary}</summary>{text_html(thought.strip())}</details>"
    reply = (head + reply).strip()
    return folded + (text_html(reply) if reply or done else "")


def _picture_html(picture: Image.Image) -> str:
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((192, 192))
    small.save(buffer, format="png")
    return picture_html(buffer.getvalue(), "the picture of the question")
