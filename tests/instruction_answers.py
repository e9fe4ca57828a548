"""Answers built to follow the instructions of a question, and spoiled ones that miss one instruction."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import cycle, islice
from math import ceil, inf
from typing import Any

from evaluation.questions import Question

Arguments = Mapping[str, Any]

SENTENCE = """the children went down to the river in the morning and then they walked home with their friends because
it was raining hard and nobody wanted to stay out there any longer than they had to"""

OTHERS = {
    "kn": "ಮಕ್ಕಳು ಬೆಳಿಗ್ಗೆ ನದಿಗೆ ಹೋದರು ಮತ್ತು ಸಂಜೆ ಮನೆಗೆ ಬಂದರು",
    "pa": "ਬੱਚੇ ਸਵੇਰੇ ਨਦੀ ਤੇ ਗਏ ਅਤੇ ਸ਼ਾਮ ਨੂੰ ਘਰ ਵਾਪਸ ਆਏ",
    "mr": "मुले सकाळी नदीवर गेली आणि संध्याकाळी घरी परत आली आहेत",
    "fa": "بچه ها صبح به کنار رودخانه رفتند و عصر به خانه برگشتند",
    "vi": "Bọn trẻ đi xuống sông vào buổi sáng và trở về nhà vào buổi tối",
    "ko": "아이들은 아침에 강으로 내려갔다가 저녁에 집으로 돌아왔습니다",
    "sw": "Watoto walikwenda mtoni asubuhi na wakarudi nyumbani jioni pamoja na marafiki zao",
    "ru": "Дети утром пошли к реке и вечером вернулись домой вместе с друзьями",
    "hi": "बच्चे सुबह नदी पर गए थे और शाम को अपने घर वापस आ गए हैं",
    "bg": "Децата отидоха сутринта на реката и вечерта се върнаха вкъщи със своите приятели",
    "pt": "As crianças foram ao rio pela manhã e voltaram para casa à noite com os seus amigos",
    "gu": "બાળકો સવારે નદીએ ગયા અને સાંજે ઘરે પાછા આવ્યા",
    "te": "పిల్లలు ఉదయం నదికి వెళ్లి సాయంత్రం ఇంటికి తిరిగి వచ్చారు",
    "it": "I bambini sono andati al fiume la mattina e sono tornati a casa la sera con gli amici",
    "ar": "ذهب الأطفال إلى النهر في الصباح وعادوا إلى البيت في المساء مع أصدقائهم",
    "ta": "குழந்தைகள் காலையில் ஆற்றுக்குச் சென்று மாலையில் வீடு திரும்பினர்",
    "de": "Die Kinder gingen am Morgen zum Fluss und kamen am Abend mit ihren Freunden nach Hause",
    "fi": "Lapset menivät aamulla joelle ja palasivat illalla kotiin ystäviensä kanssa",
    "ur": "بچے صبح دریا پر گئے تھے اور شام کو اپنے گھر واپس آ گئے ہیں",
    "th": "เด็กๆ ไปที่แม่น้ำในตอนเช้าและกลับบ้านในตอนเย็นกับเพื่อนๆ",
    "ne": "केटाकेटीहरू बिहान नदीमा गए र साँझ घर फर्किए भनेर उनीहरूले भने",
    "bn": "শিশুরা সকালে নদীতে গিয়েছিল এবং সন্ধ্যায় বাড়ি ফিরে এসেছিল",
}
TIMES_IN_ANOTHER_LANGUAGE = 10


class Wanted:
    """The instructions of a question, by name."""

    def __init__(self, question: Question) -> None:
        self.all: list[tuple[str, Arguments]] = [
            (item["name"], item["arguments"]) for item in question.facts["instructions"]
        ]

    def of(self, name: str) -> list[Arguments]:
        """The arguments of all instructions of this name."""
        return [arguments for other, arguments in self.all if other == name]

    def __contains__(self, name: str) -> bool:
        return bool(self.of(name))

    def bounds(self, name: str, count: str, relation: str = "relation") -> tuple[float, float]:
        """The least and the greatest allowed count."""
        low, high = 1.0, inf
        for arguments in self.of(name):
            if arguments[relation] == "at least":
                low = max(low, arguments[count])
            else:
                high = min(high, arguments[count] - 1)
        return low, high


def follow(question: Question) -> str:
    """An answer that follows all instructions of `question`, unless they contradict each other."""
    wanted = Wanted(question)
    words = _allowed_words(wanted)
    text = "\n".join([*_lead(wanted, words), _body(wanted, words), *_tail(wanted, words)])
    text = _paragraphs(wanted, words, text)
    if "combination:two_responses" in wanted:
        text = f"{text}\n******\n{words[0]}"
    if "detectable_format:json_format" in wanted:
        text = json.dumps({"text": text}, ensure_ascii=False)
    for arguments in wanted.of("combination:repeat_prompt"):
        text = f"{arguments['prompt_to_repeat']}\n{text}"
    if "startend:quotation" in wanted:
        text = f'"{text}"'
    if "change_case:english_lowercase" in wanted:
        return text.lower()
    return text.upper() if "change_case:english_capital" in wanted else text


def _allowed_words(wanted: Wanted) -> list[str]:
    """Words of the language without letters and keywords that may not, or seldom, occur."""
    banned = [word for given in wanted.of("keywords:forbidden_words") for word in given["forbidden_words"]]
    banned += [
        given["keyword"] for given in wanted.of("keywords:frequency") if given["relation"] == "less than"
    ]
    banned += [
        given["letter"]
        for given in wanted.of("keywords:letter_frequency")
        if given["let_relation"] == "less than"
    ]
    spoken = [OTHERS[given["language"]].split() for given in wanted.of("language:response_language")]
    return [
        word
        for word in (spoken[0] if spoken else SENTENCE.split())
        if not any(part.lower() in word.lower() for part in banned)
    ]


def _lead(wanted: Wanted, words: list[str]) -> list[str]:
    """Lines without a full stop, so that they belong to the first sentence."""
    long_words = [word for word in words if len(word) > 1]
    lines = [f"<<{words[0]}>>" for _ in wanted.of("detectable_format:title")]
    for given in wanted.of("detectable_format:multiple_sections"):
        lines += [f"{given['section_spliter']} {number}" for number in range(1, given["num_sections"] + 1)]
    for given in wanted.of("detectable_content:number_placeholders"):
        lines.append(f"[{words[0]}] " * given["num_placeholders"])
    for given in wanted.of("detectable_format:number_highlighted_sections"):
        lines.append(f"{words[0]} *{words[1]}* " * given["num_highlights"])
    for given in wanted.of("detectable_format:number_bullet_lists"):
        lines += [words[0], *[f"* {words[0]}"] * given["num_bullets"]]
    for given in wanted.of("keywords:existence"):
        lines.append(" ".join(given["keywords"]))
    for given in wanted.of("keywords:frequency"):
        if given["relation"] == "at least":
            lines.append(f"{given['keyword']} " * given["frequency"])
    for given in wanted.of("keywords:letter_frequency"):
        if given["let_relation"] == "at least":
            lines.append(given["letter"] * given["let_frequency"])
    for given in wanted.of("change_case:capital_word_frequency"):
        if given["capital_relation"] == "at least":
            lines.append(f"{long_words[0].upper()} " * given["capital_frequency"])
    return lines + ["My answer is yes." for _ in wanted.of("detectable_format:constrained_response")]


def _body(wanted: Wanted, words: list[str]) -> str:
    """Sentences, as many as asked for, with as many words as asked for."""
    low, high = wanted.bounds("length_constraints:number_sentences", "num_sentences")
    others = sum(
        max(1, len(re.findall("[.!?]", given["end_phrase"]))) for given in wanted.of("startend:end_checker")
    )
    others += len(wanted.of("detectable_content:postscript"))
    count = max(1, int(max(low, min(3, high)) - (others if high < inf else 0)))
    if "language:response_language" in wanted:
        return ". ".join([" ".join(words)] * TIMES_IN_ANOTHER_LANGUAGE)
    low, high = wanted.bounds("length_constraints:number_words", "num_words")
    repeated = [given["prompt_to_repeat"] for given in wanted.of("combination:repeat_prompt")]
    room = high - len(re.findall(r"\w+", " ".join([*_lead(wanted, words), *repeated]))) - 3
    length = max(12, ceil(low / count)) if room == inf else max(1, int(room) // count)
    comma = "" if "punctuation:no_comma" in wanted else ","
    stream = cycle(words)
    sentences = []
    for _ in range(count):
        first, *rest = islice(stream, length)
        sentences.append(" ".join([first.capitalize() if len(first) > 1 else first, *rest[:-1]]) + comma)
        sentences[-1] += f" {rest[-1]}." if rest else " ."
    return " ".join(sentences)


def _tail(wanted: Wanted, words: list[str]) -> list[str]:
    lines = [
        f"{given['postscript_marker']} {words[0]}" for given in wanted.of("detectable_content:postscript")
    ]
    return lines + [given["end_phrase"] for given in wanted.of("startend:end_checker")]


def _paragraphs(wanted: Wanted, words: list[str], text: str) -> str:
    """The text as the last of so many paragraphs."""
    for given in wanted.of("length_constraints:number_paragraphs"):
        text = "\n***\n".join([words[0]] * (given["num_paragraphs"] - 1) + [text])
    for given in wanted.of("length_constraints:nth_paragraph_first_word"):
        paragraphs = [words[0]] * (given["num_paragraphs"] - 1) + [text]
        paragraphs[given["nth_paragraph"] - 1] = (
            f"{given['first_word']} {paragraphs[given['nth_paragraph'] - 1]}"
        )
        text = "\n\n".join(paragraphs)
    return text


def _without(pattern: str, text: str) -> str:
    return re.sub(pattern, "", text, flags=re.IGNORECASE)


def _miscounted(relation: str, few: str, many: str) -> str:
    return few if relation == "at least" else many


SPOILERS: Mapping[str, Callable[[str, Arguments], str]] = {
    "keywords:existence": lambda text, given: _without(re.escape(given["keywords"][-1]), text) or "-",
    "keywords:frequency": lambda text, given: _miscounted(
        given["relation"],
        _without(re.escape(given["keyword"]), text) or "-",
        text + f" {given['keyword']}" * given["frequency"],
    ),
    "keywords:forbidden_words": lambda text, given: f"{text} {given['forbidden_words'][0]}",
    "keywords:letter_frequency": lambda text, given: _miscounted(
        given["let_relation"],
        _without(re.escape(given["letter"]), text),
        text + given["letter"] * given["let_frequency"],
    ),
    "language:response_language": lambda text, given: OTHERS["ru" if given["language"] != "ru" else "de"],
    "length_constraints:number_paragraphs": lambda text, given: f"{text}\n***\nmore",
    "length_constraints:number_words": lambda text, given: _miscounted(
        given["relation"], "one", text + " more" * given["num_words"]
    ),
    "length_constraints:number_sentences": lambda text, given: _miscounted(
        given["relation"], "...", text + " More." * given["num_sentences"]
    ),
    "length_constraints:nth_paragraph_first_word": lambda text, given: f"{text}\n\nmore",
    "detectable_content:postscript": lambda text, given: _without(r"p\.", text),
    "detectable_content:number_placeholders": lambda text, given: text.replace("]", "\n"),
    "detectable_format:number_bullet_lists": lambda text, given: f"{text}\n- more",
    "detectable_format:title": lambda text, given: text.replace("<", ""),
    "detectable_format:constrained_response": lambda text, given: text.lower(),
    "detectable_format:number_highlighted_sections": lambda text, given: text.replace("*", "_"),
    "detectable_format:multiple_sections": lambda text, given: _without(r"\d", text),
    "detectable_format:json_format": lambda text, given: text[:-1],
    "combination:repeat_prompt": lambda text, given: f"Sure! {text}",
    "combination:two_responses": lambda text, given: text.replace("*" * 6, "***"),
    "change_case:english_capital": lambda text, given: f"{text} a",
    "change_case:english_lowercase": lambda text, given: f"{text} A",
    "change_case:capital_word_frequency": lambda text, given: _miscounted(
        given["capital_relation"], text.lower(), text + " NOW" * given["capital_frequency"]
    ),
    "startend:end_checker": lambda text, given: f"{text} more",
    "startend:quotation": lambda text, given: text[1:],
    "punctuation:no_comma": lambda text, given: f"{text},",
}
