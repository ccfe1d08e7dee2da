"""The tokenizer of a run as the files that transformers and open_clip read, with the ids that were trained.

What is done to a caption before its words are looked up is written into the files too, as the normaliser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from datasets.tokens import Clean, HubTokens, OpenClipTokens, Tokenizer, TrainedBPE

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from tokenizers.normalizers import Normalizer

_START, _END = "<|startoftext|>", "<|endoftext|>"
_STOP = "<stop>"
_PLAIN = {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl"} | {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": " ",
}  # fmt: skip


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, end: int, pad: int) -> None:
    """Write what `transformers.AutoTokenizer.from_pretrained(folder)` reads.

    Args:
        tokenizer: of the run.
        folder: an existing directory.
        end: the id that closes a text; one that is not the tokenizer's own is appended to the vocabulary.
        pad: the id that stands behind a text.
    """
    if isinstance(tokenizer, TrainedBPE):
        library = _trained(tokenizer)
    elif isinstance(tokenizer, OpenClipTokens):
        library = _clips_own(tokenizer)
    else:
        assert isinstance(tokenizer, HubTokens), type(tokenizer)
        library = _from_hub(tokenizer)
    if end != tokenizer.end:
        _close_with(library, end=end, start=tokenizer.start)
    closing = library.id_to_token(library.encode("a").ids[-1])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "eos_token": closing,
        "sep_token": closing,
        "pad_token": library.id_to_token(pad),
        "model_input_names": ["input_ids"],  # no model here was trained with a mask of the padding
        "split_special_tokens": True,  # a caption that spells a special token is text
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.start is not None:
        config["bos_token"] = library.id_to_token(tokenizer.start)
    (folder / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _close_with(library: Library, *, end: int, start: int | None) -> None:
    """Give the vocabulary one more entry, which closes texts from now on."""
    from tokenizers.processors import TemplateProcessing

    library.add_special_tokens([_STOP])
    assert library.token_to_id(_STOP) == end, "ids behind those of the tokenizer"
    words = [str(library.id_to_token(each)) for each in (start, end) if each is not None]
    library.post_processor = TemplateProcessing(
        single=" $A ".join(words) if len(words) == 2 else f"$A {_STOP}",
        special_tokens=[(word, library.token_to_id(word) or 0) for word in words],
    )


def _trained(tokenizer: TrainedBPE) -> Library:
    """A BPE that was trained on the data, behind `datasets.tokens.normalise`."""
    from tokenizers import Tokenizer as Library
    from tokenizers.normalizers import Sequence

    library = Library.from_str(tokenizer._library.to_str())
    library.no_truncation()  # whoever calls it says how long a text may be
    library.normalizer = Sequence([*_lower_case(), *_single_spaces()])
    return library


def _clips_own(tokenizer: OpenClipTokens) -> Library:
    """CLIP's BPE from the file that open_clip bundles; `transformers.CLIPTokenizer` reads it as well."""
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE
    from tokenizers.normalizers import Replace, Sequence
    from tokenizers.processors import TemplateProcessing

    bundled = SimpleTokenizer()
    words = {word: i for word, i in bundled.encoder.items() if i not in bundled.all_special_ids}
    vocabulary = {**words, _START: tokenizer.start, _END: tokenizer.end}
    merges: Any = sorted(bundled.bpe_ranks, key=bundled.bpe_ranks.__getitem__)
    library = Library(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    spelt = Replace(Regex("<(start|end)_of_text>"), " ")  # which `OpenClipTokens` leaves out
    library.normalizer = Sequence([*_cleaning(tokenizer._library.clean_fn), spelt])
    pieces = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    )
    library.add_special_tokens([_START, _END])
    library.post_processor = TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, tokenizer.start), (_END, tokenizer.end)]
    )
    return library


def _from_hub(tokenizer: HubTokens) -> Library:
    """A tokenizer of transformers, behind the cleaning that open_clip puts before it."""
    from tokenizers import Tokenizer as Library
    from tokenizers.normalizers import Sequence

    library = Library.from_str(tokenizer._backend.to_str())
    own = [] if library.normalizer is None else [library.normalizer]
    library.normalizer = Sequence([*_cleaning(tokenizer._clean), *own])
    return library


def _cleaning(function: Any) -> list[Normalizer]:
    """What a cleaning function of open_clip does to ordinary captions.

    Curly quotes, ligatures and HTML entities are made plain and control characters removed. Damaged
    encodings and full-width letters, which open_clip mends with ftfy, stay as they are.
    """
    from open_clip.tokenizer import get_clean_fn
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Replace

    kind = next(each for each in get_args(Clean) if get_clean_fn(each) is function)
    steps: list[Normalizer] = [
        *(Replace(written, plain) for written, plain in _PLAIN.items()),
        Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
        Replace(Regex("[\u201c-\u201f]"), '"'),
        Replace(Regex(r"[\x00-\x08\x0b\x0e-\x1f\x7f]"), ""),
        NFC(),
    ]
    if kind == "canonicalize":
        steps += [Replace("_", " "), Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
    if kind in ("canonicalize", "lower"):
        steps += _lower_case()
    return [*steps, *_single_spaces()]


def _lower_case() -> list[Normalizer]:
    """`text.lower()`, which makes another letter of a sigma that ends a word than of others."""
    from tokenizers import Regex
    from tokenizers.normalizers import Lowercase, Replace

    return [Replace(Regex(r"(?<=\p{L})\u03a3(?!\p{L})"), "\u03c2"), Lowercase()]


def _single_spaces() -> list[Normalizer]:
    """`" ".join(text.split())`; the four separators are spaces to Python alone."""
    from tokenizers import Regex
    from tokenizers.normalizers import Replace, Strip

    return [Replace(Regex(r"[\s\x1c-\x1f]+"), " "), Strip()]
