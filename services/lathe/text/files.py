"""Which files of a base model's folder make its tokenizer and its chat template."""

from __future__ import annotations

# generation_config.json and config.json name stop tokens.
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "config.json",
    }
)
_MORE_TEMPLATES = "additional_chat_templates/"


def is_tokenizer_file(path: str) -> bool:
    """Whether `Tokenizer.from_folder` reads the file at this path within the folder."""
    return path in TOKENIZER_FILES or (path.startswith(_MORE_TEMPLATES) and path.endswith(".jinja"))
