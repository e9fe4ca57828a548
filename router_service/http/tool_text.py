"""The text of an answer that may call tools: what is text goes out at once, what may be a call is held back."""

from __future__ import annotations

from dataclasses import dataclass

from router_service.tool_calls import ToolCall, ToolCallParser


@dataclass(slots=True)
class ToolText:
    """One answer.

    Attributes:
        parser: knows how calls look.
        is_parallel: whether several calls may be told; else only the first.
    """

    parser: ToolCallParser
    is_parallel: bool
    _text: str = ""
    _num_out: int = 0

    def push(self, piece: str) -> str:
        """What is text whatever follows."""
        self._text += piece
        return self._out(len(self._text) - self.parser.held_back(self._text))

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""
        text, calls = self.parser.parse(self._text)
        self._text = text
        return self._out(len(text)), calls if self.is_parallel else calls[:1]

    def _out(self, end: int) -> str:
        piece = self._text[self._num_out : end]
        self._num_out = max(self._num_out, end)
        return piece
