"""Captions to token ids and back: a BPE trained on the captions, CLIP's tokenizer, or one of transformers."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (open_clip and transformers are untyped)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from datasets import hub
from datasets.atomic import replace
from datasets.errors import UserError
from datasets.homes import at_home

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_PAD, _START, _END = "<pad>", "<start>", "<end>"
_BYTES = 256
_FILE = "tokenizer.json"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")

Clean = Literal["lower", "whitespace", "canonicalize"]
"""What open_clip makes of a text first: lower case, nothing but spaces, or lower case without punctuation."""


class Tokenizer(Protocol):
    """What the rest of Medley needs of a tokenizer. A batch is padded with 0, whatever `pad` is."""

    vocabulary: int
    """Ids are below this."""
    end: int
    """What closes a text."""
    pad: int
    """What stands behind a text for a model that sees its padding."""
    context_length: int
    """The longest text in tokens, start and end counted."""
    fingerprint: str
    """Hex digest: a checkpoint is not resumed with another tokenizer."""

    @property
    def start(self) -> int | None:
        """What opens a text; None where texts begin with their first word, and cannot be generated."""
        ...

    def encode(self, text: str) -> list[int]:
        """Start if there is one, words, end; a text that is too long loses its last words, not its end."""
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
    pad = 0

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
    """CLIP's own BPE, which open_clip brings along; most of its models were trained with it."""

    pad = 0

    def __init__(self, *, context_length: int, clean: Clean = "lower") -> None:
        from open_clip.tokenizer import SimpleTokenizer

        library = SimpleTokenizer(context_length=context_length, clean=clean)
        self._library = library
        self.start: int = library.sot_token_id
        self.end: int = library.eot_token_id
        self.vocabulary: int = library.vocab_size
        self.context_length = context_length
        content = "\n".join([*library.encoder, str(context_length), clean])
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


class HubTokens:
    """A tokenizer of transformers, as open_clip's HFTokenizer applies it, without its padding.

    What opens and closes a text is read off the tokenizer: SigLIP's only close it.
    """

    def __init__(
        self, source: str, *, context_length: int, clean: Clean = "whitespace", strip_end: bool = False
    ) -> None:
        """Read a tokenizer; no code that may lie beside it is run.

        Args:
            source: a directory with a tokenizer.json, or the name of a repository on the hub.
            context_length: the longest text in tokens.
            clean: what is done to a text first.
            strip_end: put id 0 in the place of the end token (open_clip's `strip_sep_token`).

        Raises:
            UserError: there is no such tokenizer, or it neither pads nor closes a text.
        """
        from open_clip.tokenizer import get_clean_fn
        from transformers import AutoTokenizer

        folder = _tokenizer_folder(source)
        try:
            library: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            backend: Library = library.backend_tokenizer
        except Exception as error:  # tokenizers raises no class of its own
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} cannot be read as a tokenizer: {reason}") from error
        backend.no_truncation()
        backend.no_padding()
        tried = backend.encode("a")
        bare = tried.special_tokens_mask.index(0), tried.special_tokens_mask[::-1].index(0)
        self._before, after = tried.ids[: bare[0]], tried.ids[len(tried.ids) - bare[1] :]
        if not after or library.pad_token_id is None:
            lacking = "closes no text with an end token" if not after else "names no padding token"
            raise UserError(f"the tokenizer in {folder} {lacking}, so no model can have been trained with it")
        self._after = [0] * len(after) if strip_end else after
        # A caption that spells "</s>" would end early: such ids belong to us, not to captions.
        unknown = {library.unk_token_id} - {*self._before, *after}
        self._ours = frozenset(library.all_special_ids) - unknown
        self._backend, self._clean = backend, get_clean_fn(clean)
        self.start: int | None = self._before[0] if len(self._before) == 1 else None
        self.end: int = self._after[0]
        self.pad: int = library.pad_token_id
        self.vocabulary: int = len(library)
        self.context_length = context_length
        state = (self._before, self._after, self.pad, context_length, clean)
        content = (folder / _FILE).read_bytes() + repr(state).encode()
        self.fingerprint = blake2b(content, digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of open_clip's own call, without its padding."""
        words = self._backend.encode(self._clean(text), add_special_tokens=False).ids
        room = self.context_length - len(self._before) - len(self._after)
        return [*self._before, *[i for i in words if i not in self._ours][:room], *self._after]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that `ids` spell up to the first end."""
        return self._backend.decode(_words(ids, end=self.end), skip_special_tokens=True).strip()


def _tokenizer_folder(source: str) -> Path:
    """Where the files of a tokenizer lie, fetched from the hub unless they are a directory."""
    folder = at_home(source)
    if not folder.is_dir():
        instead = f"name a local directory with a {_FILE}: --model.tokenizer DIR"
        return hub.fetch_folder(source, _FILE, beside=_BESIDE, instead=instead)
    if not (folder / _FILE).is_file():
        raise UserError(f"{folder} holds no {_FILE}; transformers' save_pretrained writes one")
    return folder


def _words(ids: Sequence[int], *, end: int) -> list[int]:
    listed = list(ids)
    return listed[: listed.index(end)] if end in listed else listed
