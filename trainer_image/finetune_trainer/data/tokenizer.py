"""Loads the model's tokenizer, adds `model.addedTokens`, and makes the functions that turn text into token ids for
`formats.py`.

The module does not import torch, so that the preflight pod, which works without torch, can compute the same token ids
as the workers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from finetune_core.api.dataset import DatasetFormat, MessagesFormat
from finetune_core.errors import UserError
from finetune_trainer.data.chat.chat_template import ChatTemplate
from finetune_trainer.data.chat.conversations import answer_ends
from finetune_trainer.data.formats import TokenizeFunctions
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.data.prompts import completion_ending
from finetune_trainer.pod.errors import first_line, library_boundary
from finetune_trainer.pod.faulty_field import explained
from finetune_trainer.pod.model_text_files import check_begins_object, check_no_pointer, read_json_object

TOKENIZER_FILE = "tokenizer.json"
"""The file in which the tokenizers library stores a whole tokenizer. A file of sentencepiece or tiktoken (suffix
`.model`) holds only a part of a tokenizer: transformers makes up the rest, and has to guess the format of the file."""


SMALL_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""The small files of a tokenizer, which must be JSON objects. TOKENIZER_FILE is not among them, because it may have
tens of megabytes. So only the tokenizers library reads TOKENIZER_FILE as a whole."""
TEMPLATE_FILE = "chat_template.jinja"
WITHOUT_SETTINGS = ("tekken.json",)
"""Files that hold only a part of a tokenizer, like files of sentencepiece and tiktoken, but whose names do not end with
`.model`."""
UNKNOWN_PART = "did not match any variant"
"""Part of the error message of the tokenizers library for a file that a newer version of the library wrote."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the model's folder. Raises UserError if there is no tokenizer that can be loaded and
    used, if the tokenizer can only be guessed from its files, or if it has no end token."""
    _check_tokenizer_files(folder)
    # transformers and tokenizers raise whatever a wrong file makes their code raise.
    with library_boundary(partial(_not_loaded, folder)):
        tokenizer = _read_tokenizer(folder)
    with library_boundary(
        lambda error: UserError("model", f"its tokenizer can't be used: {_reason(folder, error, _read_and_use)}")
    ):
        end = _use(tokenizer)
    if type(tokenizer) is TokenizersBackend and not (folder / TOKENIZER_FILE).is_file():
        raise UserError(
            "model",
            f"its tokenizer can't be used: there is no {TOKENIZER_FILE}, and its tokenizer_config.json names no"
            " tokenizer_class that says how the other files are read",
        )
    if end is None:
        raise UserError("model", "its tokenizer has no end token (eos_token), so no answer could ever end")
    return tokenizer


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _use(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the end token, None without one. Some wrong values in the tokenizer's files raise an error only
    when they are used, and this function uses them."""
    end: int | None = tokenizer.eos_token_id
    tokenizer("")
    len(tokenizer)
    # To look up a token that is not in the vocabulary, transformers needs the unknown token, which may itself not be in
    # the vocabulary.
    list(tokenizer.all_special_ids)
    dict(tokenizer.added_tokens_decoder)
    tokenizer.decode([end] if end is not None else [])
    return end


def _read_and_use(folder: Path) -> None:
    _use(_read_tokenizer(folder))


def _reason(folder: Path, error: BaseException, load: Callable[[Path], object]) -> str:
    """Return why ``load`` raised ``error`` for the tokenizer in ``folder``: the field at fault, if one of the small
    files has such a field, and the message of the library."""
    return explained(folder, SMALL_JSON_FILES, load, error)


def _not_loaded(folder: Path, error: BaseException) -> UserError:
    known_cause = UNKNOWN_PART in str(error) or not (folder / TOKENIZER_FILE).is_file()
    reason = (first_line(error) if known_cause else _reason(folder, error, _read_tokenizer)).rstrip(" :\n")
    if UNKNOWN_PART in reason:
        reason = f"{TOKENIZER_FILE} has a part that this version of the tokenizers library does not know ({reason})"
    if not (folder / TOKENIZER_FILE).is_file():
        reason = f"there is no {TOKENIZER_FILE}, and transformers can't make a tokenizer of the other files ({reason})"
    return UserError("model", f"its tokenizer can't be loaded: {reason}")


def _check_tokenizer_files(folder: Path) -> None:
    """Raise UserError where ``folder`` has a tokenizer only in a format of sentencepiece or tiktoken, where only the
    model's own code can make the tokenizer, or where one of the tokenizer's files can't be read as what it must be."""
    with library_boundary(_unusable):
        check_no_pointer(folder / TOKENIZER_FILE)
        check_begins_object(folder / TOKENIZER_FILE)
        contents = {name: read_json_object(folder / name) for name in SMALL_JSON_FILES}
    _check_class(contents["tokenizer_config.json"])
    template = folder / TEMPLATE_FILE
    if template.is_file():
        try:
            template.read_bytes().decode()
        except ValueError as error:
            raise UserError("model", f"its {TEMPLATE_FILE} must be a text in UTF-8 ({first_line(error)})") from None
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if TOKENIZER_FILE in names or "vocab.json" in names or "vocab.txt" in names:
        return
    found = sorted(name for name in names if name.endswith(".model") or name in WITHOUT_SETTINGS)
    if found:
        raise UserError(
            "model",
            f"its tokenizer can't be used: beside {found[0]} there must be a {TOKENIZER_FILE} with the same tokenizer,"
            " which save_pretrained of transformers' AutoTokenizer writes where sentencepiece is installed",
        )


def _check_class(content: Mapping[str, Any]) -> None:
    """Raise UserError where ``content`` of tokenizer_config.json names a tokenizer that only the model's own code can
    make."""
    own, name = content.get("auto_map"), content.get("tokenizer_class")
    known = not isinstance(name, str) or tokenizer_class_from_name(name) is not None
    if isinstance(own, Mapping) and "AutoTokenizer" in own and not known:
        raise UserError(
            "model",
            f"its tokenizer can't be used: transformers has no {name}, which its tokenizer_config.json names, and code"
            " that comes with a model (auto_map) is never run",
        )


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add ``tokens`` to the tokenizer and return their ids. Raises UserError if the tokenizer already has one of the
    tokens.

    An added token matches only its exact text: surrounding spaces are kept, and the text is not normalized first.
    """
    with library_boundary(_unusable):
        known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise UserError("model.addedTokens", f"must not hold {token!r}: the model's tokenizer has it already")
    added = [AddedToken(token, special=True, normalized=False, lstrip=False, rstrip=False) for token in tokens]
    with library_boundary(_unusable):
        tokenizer.add_tokens(added, special_tokens=True)
        return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def check_ends(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int) -> None:
    """Raise UserError where the end token, or a stop token that the model's files name, has no row in the embedding,
    which has ``rows`` rows. Stop tokens that the tokenizer does not know are ignored. ``tokenizer`` is the tokenizer of
    the model in ``folder``, without `model.addedTokens`."""
    known = [number for number in model_stop_ids(folder) if 0 <= number < len(tokenizer)]
    for what, number in [("end token", tokenizer.eos_token_id), *(("stop token", number) for number in known)]:
        if number >= rows:
            raise UserError(
                "model",
                f"its tokenizer does not fit its weights: the {what} {tokenizer.convert_ids_to_tokens(number)!r} has"
                f" the id {number}, and the embedding has only {rows} rows",
            )


def _unusable(error: BaseException) -> UserError:
    return UserError("model", f"its tokenizer can't be used: {first_line(error)}")


def tokenize_functions(
    tokenizer: PreTrainedTokenizerBase,
    added_tokens: Sequence[str] = (),
    *,
    ends: Sequence[int] = (),
    today: date | None = None,
    make_pieces: Callable[..., PieceTokenizer] = PieceTokenizer,
) -> TokenizeFunctions:
    """Return the functions with which `formats.py` turns text into token ids. ``added_tokens`` are those of
    `model.addedTokens` that the tokenizer has. ``ends`` is the result of `stop_ids`; where it is empty, only the end
    token ends an answer. ``today`` is the date that a chat template gets as the current date. None means the real
    one. ``make_pieces`` makes the `PieceTokenizer`, and takes the arguments of its class."""
    end, pieces = tokenizer.eos_token_id, make_pieces(tokenizer, added_tokens, ends)
    if not tokenizer.chat_template:
        return TokenizeFunctions(pieces, end)
    chat = ChatTemplate(tokenizer, pieces, ends=ends or [end], today=today, added_tokens=added_tokens)
    return TokenizeFunctions(pieces, end, chat)


def stop_ids(tokenizer: PreTrainedTokenizerBase, form: DatasetFormat, model_stop_ids: Sequence[int] = ()) -> list[int]:
    """Return the ids of the tokens at which generation stops. These are the end token, the ids of ``model_stop_ids``
    that the tokenizer knows, and, for rows that are conversations, the tokens with which the chat template ends an
    answer. For rows with a prompt and a completion, a token of the text with which every completion ends (see
    `completion_ending`) is a stop token too: the first of them that is in the tokenizer's `added_tokens_decoder` and is
    not the unknown token.

    The ordinary tokens of that text are no stop tokens, because they may also occur within an answer.
    """
    ending = completion_ending(form.prompt_completion) if form.prompt_completion is not None else ""
    with library_boundary(_unusable):
        ids: Sequence[int] = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
    added = [number for number in ids if number in tokenizer.added_tokens_decoder and number != tokenizer.unk_token_id]
    ends = {tokenizer.eos_token_id, *added[:1], *(n for n in model_stop_ids if 0 <= n < len(tokenizer))}
    if form.messages is not None and tokenizer.chat_template:
        template = ChatTemplate(tokenizer, PieceTokenizer(tokenizer, ends=sorted(ends)), ends=sorted(ends))
        ends.update(answer_ends(form.messages, template, tokenizer.eos_token_id))
    return sorted(ends)


def generation_stop_ids(
    tokenizer: PreTrainedTokenizerBase, form: DatasetFormat, model_stop_ids: Sequence[int] = ()
) -> list[int]:
    """Return the ids of the tokens at which the trained model stops, in evaluations and where the artifact is used.

    These are the ids of `stop_ids` and, even if the job's rows are no conversations, the control tokens with which the
    tokenizer's chat template ends an answer. People usually send prompts to such a model through its chat template.
    """
    ends = set(stop_ids(tokenizer, form, model_stop_ids))
    if form.messages is not None or not tokenizer.chat_template:
        return sorted(ends)
    # The job does not use the template. So a template that takes too long, or can't be parsed, is no error of the job.
    with contextlib.suppress(UserError):
        template = ChatTemplate(tokenizer, PieceTokenizer(tokenizer, ends=sorted(ends)), ends=sorted(ends))
        turn_ends = answer_ends(MessagesFormat(), template, tokenizer.eos_token_id)
        ends.update(number for number in turn_ends if number in tokenizer.added_tokens_decoder)
    return sorted(ends)


def model_stop_ids(folder: Path) -> list[int]:
    """Return the ids of the tokens at which the model in ``folder`` stops. They are those in its
    generation_config.json, or else those in its config.json. Empty if neither file has ids in a form that can be
    read."""
    for name in ("generation_config.json", "config.json"):
        try:
            values = json.loads((folder / name).read_bytes())
            # A model that also reads pictures has the ids for its texts in the part `text_config`.
            declared = [values.get("eos_token_id"), (values.get("text_config") or {}).get("eos_token_id")]
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # `load.py` and the preflight check say what is wrong with the files of a model
        for found in (value if isinstance(value, list) else [value] for value in declared):
            ids = [number for number in found if isinstance(number, int) and not isinstance(number, bool)]
            if ids:
                return ids
    return []
