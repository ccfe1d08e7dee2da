"""Captions to token ids and back: a BPE trained on the captions, or the tokenizer of an open_clip model."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# (open_clip is untyped)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from datasets.atomic import replace
from datasets.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_PAD, _START, _END = "<pad>", "<start>", "<end>"
_BYTES = 256


class Tokenizer(Protocol):
    """What the rest of Medley needs of a tokenizer. Padding is id 0 and is never read by a model."""

    vocabulary: int
    """Ids are below this."""
    start: int
    end: int
    context_length: int
    """The longest text in tokens, start and end counted."""
    fingerprint: str
    """Hex digest: a checkpoint is not resumed with another tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Start, words, end; a text that is too long loses its last words, not its end."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text that `ids` spell up to the first end."""
        ...


def normalise(text: str) -> str:
    """The form of a caption in which captions are compared and learned: lower case, single spaces."""
    return " ".join(text.lower().split())


class TrainedBPE:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), so every text has ids and comes back whole.

    The state is the `tokenizers` library's own JSON, which other programs read as well.
    """

    start = 1
    end = 2

    def __init__(self, state: str) -> None:
        from tokenizers import Tokenizer as Library

        self._library: Library = Library.from_str(state)
        # A caption that happens to contain "<end>" is text and must not end early.
        self._library.encode_special_tokens = True
        assert self._library.truncation is not None, "the state names no context length"
        self.context_length: int = self._library.truncation["max_length"]
        self.vocabulary: int = self._library.get_vocab_size()
        self.fingerprint = blake2b(state.encode(), digest_size=16).hexdigest()
        self._state = state

    @classmethod
    def train(cls, captions: Iterable[str], *, vocabulary: int, context_length: int) -> TrainedBPE:
        """Learn up to `vocabulary` entries; the same captions in any order of hashing give the same file.

        Raises:
            UserError: `vocabulary` has no room for the 256 bytes and the three special tokens.
        """
        from tokenizers import Tokenizer as Library
        from tokenizers.decoders import ByteLevel as Joined
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
        from tokenizers.processors import TemplateProcessing
        from tokenizers.trainers import BpeTrainer

        special = [_PAD, _START, _END]
        smallest = _BYTES + len(special)
        if vocabulary < smallest:
            raise UserError(f"a vocabulary of {vocabulary} is too small: bytes alone need {smallest}")
        library = Library(BPE())
        library.pre_tokenizer = ByteLevel(add_prefix_space=False)
        library.decoder = Joined()
        trainer = BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            special_tokens=special,
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(map(normalise, captions), trainer)
        library.post_processor = TemplateProcessing(
            single=f"{_START} $A {_END}", special_tokens=[(_START, cls.start), (_END, cls.end)]
        )
        library.enable_truncation(context_length)
        return cls(library.to_str())

    @classmethod
    def load(cls, path: Path) -> TrainedBPE:
        """Read what `save` wrote."""
        return cls(path.read_text(encoding="utf-8"))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        replace(path, self._state.encode())

    def encode(self, text: str) -> list[int]:
        """Start, words, end, at most `context_length` ids."""
        return self._library.encode(normalise(text)).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The normalised text that `ids` spell up to the first end."""
        return self._library.decode(_words(ids, end=self.end), skip_special_tokens=True)


class OpenClipTokens:
    """The tokenizer that an open_clip model was trained with, for the models whose tokenizer it bundles."""

    def __init__(self, model: str) -> None:
        """Find the tokenizer of an open_clip model name.

        Raises:
            UserError: the model is unknown, or its tokenizer would have to be downloaded.
        """
        import open_clip
        from open_clip.tokenizer import SimpleTokenizer

        config: dict[str, Any] | None = open_clip.get_model_config(model)
        if config is None:
            raise UserError(f"open_clip has no model {model!r}; open_clip.list_models() names those it has")
        named = config["text_cfg"].get("hf_tokenizer_name")
        if named or "siglip" in model.lower():
            raise UserError(
                f"open_clip does not bundle the tokenizer of {model} ({named or 'SigLIP'}) and would have to "
                "download it; choose a model with CLIP's own tokenizer, such as ViT-B-32"
            )
        library = open_clip.get_tokenizer(model)
        assert isinstance(library, SimpleTokenizer), type(library)
        assert library.context_length is not None, model
        self._library = library
        self.start: int = library.sot_token_id
        self.end: int = library.eot_token_id
        self.vocabulary: int = library.vocab_size
        self.context_length: int = library.context_length
        content = "\n".join([*library.encoder, str(self.context_length)])
        self.fingerprint = blake2b(content.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of open_clip's own call, without its padding."""
        # A caption that spells "<end_of_text>" would end early: such ids belong to us, not to captions.
        words = [i for i in self._library.encode(text) if i not in self._library.all_special_ids]
        return [self.start, *words[: self.context_length - 2], self.end]

    def decode(self, ids: Sequence[int]) -> str:
        """The words that `ids` spell up to the first end, a space after each as CLIP's vocabulary has it."""
        words = [i for i in _words(ids, end=self.end) if i != self.start]
        return self._library.decode(words).strip()


def _words(ids: Sequence[int], *, end: int) -> list[int]:
    listed = list(ids)
    return listed[: listed.index(end)] if end in listed else listed
