"""`lathe chat`: one question, or a conversation."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lathe.cli.connection import client_of
from lathe.cli.output import JSON, note, print_json
from lathe.client import Client
from lathe.v1 import inference_pb2 as pb


def chat(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A base model's id, ft:…, or a deployment.")],
    message: Annotated[
        str | None, typer.Argument(help="Left out: a conversation; -: standard input.")
    ] = None,
    system: Annotated[str, typer.Option(help="What comes first, as the system's message.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; 1 if unset.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 if unset.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Up to what the context leaves if unset.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed samples the same.")] = None,
    stream: Annotated[bool, typer.Option(help="Print as it is sampled.")] = True,
    as_json: JSON = False,
) -> None:
    """Talk to a model. --json prints the whole answer as one document."""
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with client_of(context) as client:
        if message is None and not as_json and sys.stdin.isatty():
            _converse(client, model, messages, options)
            return
        text = sys.stdin.read() if message in (None, "-") else str(message)
        messages.append({"role": "user", "content": text})
        if as_json:
            print_json(client.chat(model, messages, **options))
        elif stream:
            for piece in _pieces(client.chat_stream(model, messages, **options)):
                print(piece, end="", flush=True)
            print()
        else:
            print(client.chat(model, messages, **options).choices[0].message.content)


def _converse(client: Client, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> None:
    note(f"Talking to {model}. An empty line or Ctrl-D ends.")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            note("")
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in _pieces(client.chat_stream(model, messages, **options)):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            note(" (stopped)")
        print()
        messages.append({"role": "assistant", "content": answer})


def _pieces(chunks: Iterator[pb.ChatCompletionChunk]) -> Iterator[str]:
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content:
                yield choice.delta.content
            for call in choice.delta.tool_calls:
                yield f"{call.function.name}({call.function.arguments})"
