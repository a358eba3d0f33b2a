"""From sampled tokens to what a client reads: text, stop strings, tool calls, logprobs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lathe.gateway.model import FunctionToolCall, SampledToken, TokenLogprob, TopLogprob
from lathe.text.stops import StopChecker
from lathe.text.tokenizer import Tokenizer
from lathe.text.tools import parse_tool_calls

# Where a tool call may begin in the families whose calls text.tools can read.
_CALL_MARKERS = ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<function")
_CALL_OPENERS = ("{", "[")


class ToolGate:
    """Lets text through until a tool call may have begun, and holds everything from there on.

    A call is known as one only when it is whole, so until then none of it may reach the client as text.
    """

    def __init__(self) -> None:
        self._checker = StopChecker(_CALL_MARKERS)
        self._closed = False
        self._blank = True

    def push(self, text: str) -> str:
        """The part of the text that is no tool call for sure."""
        if self._closed or not text:
            return ""
        if self._blank and text.strip():
            self._blank = False
            if text.lstrip().startswith(_CALL_OPENERS):
                self._closed = True
                return ""
        safe, self._closed = self._checker.push(text)
        return safe


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left at the end of a choice."""

    text: str
    tool_calls: tuple[FunctionToolCall, ...]


class ChoiceText:
    """One choice as it grows. `push` each sampled token until `stopped`; `finish` once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        with_tools: bool,
        new_call_id: Callable[[], str],
        parallel_tool_calls: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        # Some families mark their calls with special tokens: they must stay in the text to be parsed.
        self._decoder = tokenizer.stream_decoder(skip_special_tokens=not with_tools)
        self._stops = StopChecker(stop)
        self._gate = ToolGate() if with_tools else None
        self._new_call_id = new_call_id
        self._parallel = parallel_tool_calls
        self._ends = frozenset(tokenizer.eos_ids)
        self._whole: list[str] = []
        self._sent = 0
        self.stopped = False

    def push(self, token: SampledToken) -> str:
        """The text that may be sent now. Sets `stopped` when a stop string is complete."""
        if token.token in self._ends:
            return ""
        safe, self.stopped = self._stops.push(self._decoder.push(token.token))
        return self._let_through(safe)

    def finish(self) -> Rest:
        """What was held back, as text or as the tool calls that it is."""
        if not self.stopped:
            safe, self.stopped = self._stops.push(self._decoder.flush())
            tail = self._let_through(safe)
            if not self.stopped:
                tail += self._let_through(self._stops.flush())
        else:
            tail = ""
        if self._gate is None:
            return Rest(tail, ())
        return self._parsed(tail)

    def logprob(self, token: SampledToken) -> TokenLogprob | None:
        """A sampled token with its text; None for the one that ended the turn."""
        if token.token in self._ends:
            return None
        top = tuple(TopLogprob(*self._shown(other), logprob) for other, logprob in token.top)
        return TokenLogprob(*self._shown(token.token), token.logprob, top)

    def _let_through(self, text: str) -> str:
        self._whole.append(text)
        passed = self._gate.push(text) if self._gate is not None else text
        self._sent += len(passed)
        return passed

    def _parsed(self, tail: str) -> Rest:
        whole = "".join(self._whole)
        content, calls = parse_tool_calls(whole, self._tokenizer.template)
        if not calls:
            return Rest(tail + whole[self._sent :], ())
        # Parsing trims the text around calls; only what goes beyond the part already sent is news.
        before = whole[: self._sent - len(tail)]
        rest = (content or "")[len(before) :] if (content or "").startswith(before) else ""
        wanted = calls if self._parallel else calls[:1]
        return Rest(rest, tuple(self._call(call["function"]) for call in wanted))

    def _call(self, function: Mapping[str, str]) -> FunctionToolCall:
        return FunctionToolCall(self._new_call_id(), function["name"], function["arguments"])

    def _shown(self, token_id: int) -> tuple[str, bytes]:
        data = self._tokenizer.token_bytes(token_id)
        return data.decode("utf-8", "replace"), data
