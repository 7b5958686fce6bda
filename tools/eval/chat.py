# SPDX-License-Identifier: MIT
"""Conversations as texts: in a model's own template, whose marks become its special tokens."""
import json

from .llama import F16, LlamaError, running_server
from .outputs import write_text

SHAPES = ('give JSON: a list of messages as {"role": "user", "content": "..."}, a list of such lists, or an object with '
          '"messages" in each line')


def read(path):
    """The conversations in a file, each a list of messages."""
    content = path.read_text(encoding="utf-8", errors="replace")
    try:
        try:
            found = json.loads(content)
        except ValueError:
            found = [json.loads(line) for line in content.splitlines() if line.strip()]
        found = [found] if isinstance(found, dict) or is_message(found[0]) else found
        found = [chat["messages"] if isinstance(chat, dict) else chat for chat in found]
        if all(chat and all(map(is_message, chat)) for chat in found):
            return found
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise LlamaError(f"{path} has no conversations; {SHAPES}") from error
    raise LlamaError(f"{path} has something else than conversations; {SHAPES}")


def is_message(value):
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def tokens_file(text):
    return text.with_suffix(".tokens")


def render(setup, path, folder):
    """
    A file in `folder` with the conversations as the model would see them, named as theirs; next to it the tokens that they are.
    """
    text = folder / f"{path.stem}.txt"
    if text.exists() and tokens_file(text).exists():
        return text
    chats = read(path)
    # Else it would leave a last answer open, for more of it.
    with running_server(setup, F16, ["-c", "256", "-np", "1", "--no-prefill-assistant"]) as server:
        prompts = [server.post("/apply-template", messages=chat, add_generation_prompt=False)["prompt"] for chat in chats]
        tokens = server.post("/tokenize", content="".join(prompts), add_special=False, parse_special=True)["tokens"]
    folder.mkdir(exist_ok=True)
    new = text.with_suffix(".new")
    for final, content in ((text, "".join(prompts)), (tokens_file(text), json.dumps(tokens))):
        write_text(new, content)
        new.replace(final)
    return text


def check_tokens(text, found):
    """Raise LlamaError unless these are the first tokens of a rendered text."""
    if json.loads(tokens_file(text).read_text(encoding="utf-8"))[:len(found)] != list(found):
        raise LlamaError(f"llama-perplexity did not read the special tokens of {text.stem}: libtq-flush-log.so, which lets it, "
                         "belongs next to the plug-in, in a folder without blanks in its name")
