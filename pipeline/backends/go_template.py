"""The chat template of a GGUF as Ollama writes one (Go), where it is known to say the same.

Ollama otherwise guesses by the Jinja text in the file. Only templates of the ChatML kind are known here, and each is rendered with sample
chats and compared before it counts as one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.backends.gguf_header import read_header

CHATML = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
_MARK = "~the place of the system text~"
# what a template out of a file may raise beside its own refusals
_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_CHATS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "One line."),),
    (("user", " Blanks around,\n\nand lines. "),),
    (("user", "first"), ("assistant", '{"rating": "a", "rationale": "b"}'), ("user", "second")),
    (("user", "{{ .System }} <b>&amp;'\" {% raw %}"),),
)


@dataclass(frozen=True, slots=True)
class GoTemplate:
    template: str
    system: str | None  # what the file's template puts in where a chat has no system message
    stop: tuple[str, ...]


def go_template(gguf: Path) -> GoTemplate | None:
    """The file's template in Go; None where it has none or one that is not known to mean the same.

    Raises:
        ArtifactError: the GGUF is damaged.
    """
    source = read_header(gguf).values.get("tokenizer.chat_template")
    return chatml(source) if isinstance(source, str) else None


def chatml(jinja: str) -> GoTemplate | None:
    """The same for the text of a Jinja template."""
    if "<|im_start|>" not in jinja:
        return None
    try:
        with_system = _jinja(jinja, (("system", _MARK), *_CHATS[0]))
        plain = _jinja(jinja, _CHATS[0])
        default = re.fullmatch(r"<\|im_start\|>system\n(.*)<\|im_end\|>\n", plain.removesuffix(_said(_CHATS[0])), re.DOTALL)
        system = default[1] if default else None
        opening = (("system", system),) if system is not None else ()
        same = with_system == _said((("system", _MARK), *_CHATS[0])) and all(
            _jinja(jinja, chat) == _said((*opening, *chat)) for chat in _CHATS
        )
    except _FAILURES:
        return None
    return GoTemplate(CHATML, system, ("<|im_start|>", "<|im_end|>")) if same else None


def _said(chat: Sequence[tuple[str, str]]) -> str:
    """What CHATML gives for a chat."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in chat) + "<|im_start|>assistant\n"


def _jinja(source: str, chat: Sequence[tuple[str, str]]) -> str:
    """What llama.cpp and transformers give: the same settings of Jinja, in its sandbox, since the text comes out of a file."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    messages = [{"role": role, "content": content} for role, content in chat]
    return environment.from_string(source).render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")


def _refuse(message: str) -> str:
    raise TemplateError(message)
