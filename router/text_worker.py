"""A process of the router's text pool: tokenizes, renders chat templates. Killed when it takes too long.

Started as `python -m router.text_worker MODEL_DIR` by processes.py. Whatever a prompt or a template does, it does here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from router.answering import Answer, serve
from splitfire.core.errors import ModelError, one_line
from splitfire.core.limits import MAX_RENDERED_CHARS
from splitfire.core.model_dir import ModelDir

MAX_MEMORY_BYTES = 2 << 30
SELF_TEST = ("Hello, world!", "def f(x):\n\treturn x  # é 漢字 🙂", " \n\n\t ", "a" * 1000, "a" * 64 + "!")
PROBE_CHAT = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"})


class BadInput(Exception):
    """The caller's text or messages cannot be used; the message says why."""


class _Guard:
    """Replaces special-token text in whatever people wrote by marks that no template touches; `originals` has them by mark."""

    def __init__(self, specials: Sequence[str]) -> None:
        self.originals: dict[str, str] = {}
        self._specials = specials
        self._nonce = os.urandom(8).hex()

    def of(self, value: Any) -> Any:
        """The same, to its last string; names of an object's members too."""
        if isinstance(value, dict):
            return {self.of(name): self.of(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.of(inner) for inner in value]
        return self._marked(value) if isinstance(value, str) else value

    def _marked(self, text: str) -> str:
        for special in self._specials:
            if special in text:
                mark = f"\ue000{self._nonce}{len(self.originals)}\ue001"
                self.originals[mark] = special
                text = text.replace(special, mark)
        return text


class TextEngine:
    """Tokenizer and template of one model."""

    def __init__(self, model: ModelDir) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(model.tokenizer_path))
        except BaseException as exc:  # the tokenizers library panics with a BaseException of its own
            raise ModelError(f"tokenizer.json: {one_line(str(exc), 200)}") from exc
        ids = list(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if len(set(ids)) != len(ids):
            raise ModelError(f"tokenizer.json: {len(ids) - len(set(ids))} token ids stand for more than one token")
        largest = max(ids, default=-1)
        if largest >= model.config.vocab_size:
            raise ModelError(f"tokenizer.json: has token id {largest}, config.json: vocab_size is {model.config.vocab_size}")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._specials = sorted(
            (t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special), key=len, reverse=True
        )
        self._template = _compile(model.chat_template) if model.chat_template is not None else None
        self._template_tokens = dict(model.template_tokens)
        self._self_test()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """A prompt as it stands: text that looks like a special token is plain text, unless the tenant may write them (B09)."""
        if not allow_special:
            return self._encode_plain(text, add_special_tokens=True)
        self._tokenizer.encode_special_tokens = False
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def encode_continuation(self, text: str) -> list[int]:
        """Text in the middle of other text."""
        return self._encode_plain(text, add_special_tokens=False)

    def encode_chat(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Messages, and the tools there are, through the model's template. Special tokens count in the template, never in what
        people wrote."""
        guard = _Guard(self._specials)
        rendered = self._render([guard.of(message) for message in messages], [guard.of(tool) for tool in tools])
        originals = guard.originals
        ids: list[int] = []
        for piece, is_original in _split(rendered, originals):
            if is_original:
                ids += self._encode_plain(piece, add_special_tokens=False)
            elif piece:
                self._tokenizer.encode_special_tokens = False
                ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def _encode_plain(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = True
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _render(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        if self._template is None:
            raise BadInput("the model has no chat template")
        parts: list[str] = []
        length = 0
        try:
            given = {"messages": messages, "tools": list(tools) or None, "add_generation_prompt": True, **self._template_tokens}
            for part in self._template.generate(**given):
                length += len(part)
                if length > MAX_RENDERED_CHARS:
                    raise BadInput(f"the rendered conversation is longer than {MAX_RENDERED_CHARS} characters")
                parts.append(part)
        except jinja2.TemplateError as exc:
            raise BadInput(f"the model's chat template refuses it: {one_line(str(exc), 200)}") from exc
        except BadInput:
            raise
        except Exception as exc:  # a template computes whatever it likes
            raise BadInput(f"the model's chat template fails on it: {type(exc).__name__}") from exc
        return "".join(parts)

    def _self_test(self) -> None:
        for text in SELF_TEST:
            try:
                self.encode(text)
            except BaseException as exc:  # also the library's panics: a regular expression that gives up, say
                raise ModelError(f"tokenizer.json: fails on {text[:40]!r}: {one_line(str(exc), 200)}") from exc
        if self._template is None:
            return
        try:
            self._render([dict(m) for m in PROBE_CHAT])
        except BadInput as exc:
            raise ModelError(f"chat_template: {exc}") from exc


def _compile(source: str) -> jinja2.Template:
    """In the sandbox of Hugging Face's own settings: no attributes that begin with an underscore, nothing mutable."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as exc:
        raise ModelError(f"chat_template: {exc}") from exc


def _split(text: str, originals: dict[str, str]) -> list[tuple[str, bool]]:
    """Template text and what stood for marks, in order."""
    pieces = [(text, False)]
    for mark, original in originals.items():
        following: list[tuple[str, bool]] = []
        for piece, is_original in pieces:
            if is_original:
                following.append((piece, True))
                continue
            for i, part in enumerate(piece.split(mark)):
                if i:
                    following.append((original, True))
                following.append((part, False))
        pieces = following
    return pieces


def load(path: Path) -> Callable[[Answer], Answer]:
    engine = TextEngine(ModelDir(path))
    return lambda question: _answer(engine, question)


def _answer(engine: TextEngine, question: Answer) -> Answer:
    try:
        if "text" in question:
            return {"ids": engine.encode(question["text"], allow_special=question.get("allow_special", False))}
        if "continuation" in question:
            return {"ids": engine.encode_continuation(question["continuation"])}
        return {"ids": engine.encode_chat(question["messages"], question["tools"])}
    except BadInput as exc:
        return {"bad": str(exc)}
    except BaseException as exc:
        return {"failed": type(exc).__name__}


if __name__ == "__main__":
    serve(load, MAX_MEMORY_BYTES)
