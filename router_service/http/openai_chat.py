"""POST /v1/chat/completions: what a request means."""

from __future__ import annotations

from fusionroute.errors import invalid
from router_service.http.chat_choice import ChatChoice
from router_service.http.chat_prompt import Conversation, conversation_ids
from router_service.http.openai_answering import Answer, Shape
from router_service.http.openai_answers import Choice
from router_service.http.openai_completions import details_of
from router_service.http.openai_requests import ChatBody, one_of
from router_service.http.openai_tools import tool_use
from router_service.http.openai_turns import numbered, turn_request
from router_service.http.response_format import set_format
from router_service.http.service import RouterApi
from router_service.http.token_scores import TokenScores
from router_service.http.token_text import TokenText
from router_service.http.tool_text import ToolText

SHAPE = Shape("chatcmpl", "chat.completion", "chat.completion.chunk")


async def chat(body: ChatBody, api: RouterApi, text: TokenText) -> Answer:
    """The answer to a request; nothing of it is written yet.

    Raises:
        FusionRouteError: the request cannot be served.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", body.top_logprobs, "only together with logprobs = true")
    if body.max_tokens == 0:
        raise invalid("max_tokens", 0, "1 or more")
    max_tokens = one_of(body.max_completion_tokens, body.max_tokens, api.max_new_tokens)
    num_top = body.top_logprobs or 0
    request = turn_request(body, api, max_tokens, max(1, num_top) if body.logprobs else 0)
    set_format(request, body.response_format)
    tools = tool_use(body, api.tokenizer)
    if tools.constraint is not None:
        request.sampling.constraint.CopyFrom(tools.constraint)
    conversation = Conversation(
        body.messages,
        tools.tools,
        continues=bool(body.continue_final_message),
        variables=body.chat_template_kwargs or {},
    )
    request.token_ids.ids.extend(await conversation_ids(conversation, api))
    requests = numbered([request], body.n or 1, body.seed)
    scores = TokenScores(num_top, text) if body.logprobs else None
    choices: list[Choice] = [
        ChatChoice(
            index,
            scores,
            details_of(body),
            None if tools.parser is None else ToolText(tools.parser, tools.is_parallel),
        )
        for index in range(len(requests))
    ]
    return Answer(api, body, SHAPE, requests, choices)
