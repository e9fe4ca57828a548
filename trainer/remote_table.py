"""Which server of somebody else is asked, in a job's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class RemoteTable(BaseModel):
    """A single model behind somebody else's server that is asked instead of the router."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    url: str = Field(min_length=1, description="http(s)://HOST:PORT of the server.")
    api: Literal["auto", "tgi", "openai"] = Field(
        default="auto", description="What it speaks; auto = whichever it answers to."
    )
    model: str = Field(default="", description="Its name for the model; empty = the one that it serves first.")
    api_key_file: Path | None = Field(
        default=None, description="File with its key; without one, $FUSIONROUTE_REMOTE_API_KEY if that is set."
    )


Remote = Annotated[
    RemoteTable | None,
    Field(description="Ask this server instead of the router; `checkpoint` must then be named."),
]
