"""From what a row says to the very text a model reads: pieces, some of which are to be learnt.

A prompt is rendered exactly as the router service renders it for an answer, so what is trained is what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusionroute.errors import InvalidRequest, Reason
from trainer.config import DataTable
from trainer.data.formats import Answered, Completion, Conversation, Message, Pair, PlainText
from trainer.data.problems import RowFault, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAIL_CHARACTERS = 32
"""So much of an answer's end must be found in what a template makes of it; what is before may be rearranged."""


@dataclass(frozen=True, slots=True)
class Script:
    """A text in pieces.

    Attributes:
        pieces: joined, they are the text; a piece to be learnt begins where the model would begin to write.
        learnt: whether the tokens of each piece are targets.
        has_template: a chat template made it and has put special tokens and ends of turns where they belong.
        ended: the last piece is whole, so that its end is to be learnt too.
    """

    pieces: tuple[str, ...]
    learnt: tuple[bool, ...]
    has_template: bool = False
    ended: bool = True


class Renderer:
    """Renders rows for one tokenizer.

    Args:
        tokenizer: of the models.
        chat_template: Jinja text instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template if chat_template is not None else tokenizer.chat_template

    @classmethod
    def of(cls, table: DataTable, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """With the template that a configuration names.

        Raises:
            InvalidRequest: INVALID_FIELD, the template's file cannot be read.
        """
        return cls(tokenizer, read_chat_template(table))

    def render(self, row: Answered) -> Script:
        """One text. Raises RowFault."""
        match row:
            case PlainText(text):
                return Script((text,), (True,))
            case Completion(prompt, completion, ended):
                return Script((prompt, completion), (False, True), ended=ended)
            case Conversation():
                return self._conversation(row)

    def render_pair(self, pair: Pair) -> tuple[Script, Script]:
        """Chosen and rejected, with one prompt. Raises RowFault."""
        chosen = self._named("chosen", pair.chosen)
        rejected = self._named("rejected", pair.rejected)
        return chosen, rejected

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """Messages as the router service renders them for an answer. Raises RowFault."""
        return self._apply(messages, "prompt", add_generation_prompt=True)

    def _named(self, field: str, row: Completion | Conversation) -> Script:
        try:
            return self.render(row)
        except RowFault as fault:
            raise RowFault(fault.field or field, f"{field}: {fault.explanation}") from None

    def _conversation(self, row: Conversation) -> Script:
        messages = row.messages
        whole = self._apply(messages, "messages", add_generation_prompt=False)
        pieces: list[str] = []
        learnt: list[bool] = []
        done = 0
        for index, message in enumerate(messages):
            if index < row.num_prompt or message["role"] != "assistant":
                continue
            start = self._start(messages[:index], message, whole)
            is_last = index == len(messages) - 1
            end = len(whole) if is_last else self._end(messages[: index + 1], whole)
            if message["content"].strip()[-TAIL_CHARACTERS:] not in whole[start:end]:
                raise RowFault(
                    f"messages[{index}].content",
                    f"the chat template does not write it; it writes {shown(whole[start:end])}",
                )
            pieces += [whole[done:start], whole[start:end]]
            learnt += [False, True]
            done = end
        return Script(tuple(pieces), tuple(learnt), has_template=True, ended=row.ended)

    def _start(self, asked: Sequence[Message], answer: Message, whole: str) -> int:
        """Where the answer to `asked` begins in `whole`."""
        field = f"messages[{len(asked)}]"
        prompt = self._apply(asked, field, add_generation_prompt=True)
        if not whole.startswith(prompt):
            raise RowFault(
                field,
                "the chat template writes the prompt differently once it is answered "
                f"({_difference(prompt, whole)}); name one that does not as `chat_template`",
            )
        begins = whole[len(prompt) :]
        if begins.lstrip().startswith(answer["content"].strip()):
            return len(prompt)
        if prompt == self._apply(asked, field, add_generation_prompt=False):
            header = begins.partition(answer["content"].strip())[0]
            raise RowFault(
                field,
                "the chat template has no generation prompt: `add_generation_prompt` changes nothing, "
                f"yet {shown(header)} stands before the answer",
            )
        return len(prompt)

    def _end(self, answered: Sequence[Message], whole: str) -> int:
        """Where the last of `answered` ends in `whole`."""
        text = self._apply(answered, f"messages[{len(answered) - 1}]", add_generation_prompt=False)
        if not whole.startswith(text):
            # Some templates end a whole conversation with EOS, but not the turns before.
            text = text.removesuffix(self._tokenizer.eos_token or "")
        if not whole.startswith(text):
            raise RowFault(
                f"messages[{len(answered) - 1}]",
                "the chat template writes this answer differently once the conversation goes on "
                f"({_difference(text, whole)}); name one that does not as `chat_template`",
            )
        return len(text)

    def _apply(self, messages: Sequence[Message], field: str, *, add_generation_prompt: bool) -> str:
        if self._template is None:
            raise InvalidRequest(
                Reason.DATA_INVALID,
                "a row holds messages, but the tokenizer has no chat template: name one as `chat_template`",
                metadata={"field": "chat_template"},
            )
        try:
            text: Any = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # templates raise what they like
            raise RowFault(field, f"the chat template refuses it: {type(error).__name__}: {error}") from None
        return str(text)


def read_chat_template(table: DataTable) -> str | None:
    """The text of the template that a configuration names, None where it names none.

    Raises:
        InvalidRequest: INVALID_FIELD, the file cannot be read.
    """
    if table.chat_template is None:
        return None
    try:
        return table.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            Reason.INVALID_FIELD, f"chat_template = {table.chat_template} cannot be read: {error}"
        ) from None


def _difference(text: str, whole: str) -> str:
    place = next(
        (index for index, (mine, other) in enumerate(zip(text, whole, strict=False)) if mine != other),
        min(len(text), len(whole)),
    )
    return f"{shown(text[place : place + 30])} became {shown(whole[place : place + 30])} at character {place}"
