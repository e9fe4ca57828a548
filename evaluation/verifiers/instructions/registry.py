"""All kinds of instructions by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluation.verifiers.instructions import combination, content, form, keywords, language, length, shape
from evaluation.verifiers.instructions.arguments import Instruction, build
from fusionroute.errors import invalid

ALL_KINDS: tuple[type[Instruction], ...] = (
    keywords.Existence,
    keywords.Frequency,
    keywords.ForbiddenWords,
    keywords.LetterFrequency,
    language.ResponseLanguage,
    length.NumberOfParagraphs,
    length.NumberOfWords,
    length.NumberOfSentences,
    length.NthParagraphFirstWord,
    content.Postscript,
    content.NumberOfPlaceholders,
    form.BulletList,
    form.Title,
    form.ConstrainedResponse,
    form.HighlightedSections,
    form.MultipleSections,
    form.JsonFormat,
    combination.RepeatPrompt,
    combination.TwoResponses,
    shape.EnglishCapital,
    shape.EnglishLowercase,
    shape.CapitalWordFrequency,
    shape.EndChecker,
    shape.Quotation,
    shape.NoComma,
)
KINDS: Mapping[str, type[Instruction]] = {kind.name: kind for kind in ALL_KINDS}
NEED_LANGUAGES = frozenset(
    kind.name for kind in (language.ResponseLanguage, shape.EnglishCapital, shape.EnglishLowercase)
)
"""Those that need the extra `evaluation`."""


def instruction(name: Any, arguments: Mapping[str, Any], place: str) -> Instruction:
    """The instruction of this name with these arguments.

    Args:
        place: where it stands, for messages: ``instructions[0]``.

    Raises:
        InvalidRequest: INVALID_FIELD naming place, instruction, argument, value and limit.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise invalid(f"{place} name", name, f"one of {', '.join(KINDS)}")
    return build(KINDS[name], arguments, place)
