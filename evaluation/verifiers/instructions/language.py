"""In which language an answer is written, by langdetect (extra `evaluation`), which the benchmark uses as well.

langdetect draws random numbers. Here their seed is fixed and its profiles are read in the order of their names, so the
same text always has the same language. It is weak on a few words; the benchmark asks for whole answers.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from evaluation.verifiers.instructions.arguments import OneOf
from fusionroute.errors import InvalidRequest, Reason

if TYPE_CHECKING:
    from langdetect import DetectorFactory

_CODES = """
af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro ru
sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw
"""
LANGUAGES = tuple(_CODES.split())
"""What langdetect tells apart, as ISO 639-1 has it."""

_loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class ResponseLanguage:
    """The answer is in a language, given by its code.

    Differs: an answer in no language, only digits for example, is wrong; the usual check lets it through. For
    answers in capitals see `language_of`.
    """

    name: ClassVar[str] = "language:response_language"
    language: Annotated[str, OneOf(LANGUAGES)]

    def is_followed(self, text: str) -> bool:
        """Whether it is.

        Raises:
            InvalidRequest: INVALID_FIELD, langdetect is not installed.
        """
        return language_of(text) == self.language


def language_of(text: str) -> str | None:
    """The code of the language that `text` is most likely in; None where it holds no word of any.

    A text in capitals is looked at in small letters, because langdetect uses only the first letters of words in
    capitals: as they are it takes 4 % of 400 English texts for German, in small letters none.

    Raises:
        InvalidRequest: INVALID_FIELD, langdetect is not installed.
    """
    with _loading:
        factory = _profiles()
    from langdetect.lang_detect_exception import LangDetectException

    detector = factory.create()
    detector.append(text.lower() if text.isupper() else text)
    try:
        code = str(detector.detect())
    except LangDetectException:
        return None
    return code if code in LANGUAGES else None


def check_installed() -> None:
    """Raises InvalidRequest, INVALID_FIELD: langdetect is not installed."""
    try:
        found = find_spec("langdetect")
    except ValueError:  # what stands for it was put there by hand, without a place that it was loaded from
        found = None
    if found is None:
        raise _not_installed()


@cache
def _profiles() -> DetectorFactory:
    try:
        from langdetect import PROFILES_DIRECTORY, DetectorFactory
    except ImportError:
        raise _not_installed() from None
    factory = DetectorFactory()
    factory.seed = 0
    files = sorted(Path(PROFILES_DIRECTORY).iterdir())
    factory.load_json_profile([file.read_text(encoding="utf-8") for file in files if file.name in LANGUAGES])
    return factory


def _not_installed() -> InvalidRequest:
    return InvalidRequest(
        Reason.INVALID_FIELD,
        "instructions about an answer's language need the package `langdetect`: pip install 'fusionroute[evaluation]'",
    )
