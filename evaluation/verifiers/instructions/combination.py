"""Instructions that join an answer with something else: a second answer, the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from evaluation.verifiers.instructions.arguments import Text
from evaluation.verifiers.instructions.length import inner_pieces

RESPONSE_DIVIDER = "******"


@dataclass(frozen=True, slots=True)
class TwoResponses:
    """Two different answers with six asterisks between them."""

    name: ClassVar[str] = "combination:two_responses"

    def is_followed(self, text: str) -> bool:
        """Whether there are two, neither empty, and they differ."""
        answers = inner_pieces(text, RESPONSE_DIVIDER)
        return len(answers) == 2 and all(answers) and answers[0] != answers[1]


@dataclass(frozen=True, slots=True)
class RepeatPrompt:
    """The answer begins with the request, word for word; upper and lower case are the same."""

    name: ClassVar[str] = "combination:repeat_prompt"
    prompt_to_repeat: Text

    def is_followed(self, text: str) -> bool:
        """Whether it does."""
        return text.strip().lower().startswith(self.prompt_to_repeat.lower())
