import re
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datasets.classes import Classes, load_classes
from datasets.errors import UserError
from pretrain.evaluate.zero_shot import (
    accuracy,
    best_prompt,
    class_embeddings,
    label_indices,
    top1,
)

FRUIT = Classes(("red apple", "Pear_tree", "fig"), ("a {}", "one {} here"), source="fruit.txt")


def test_a_class_file_is_names_and_templates(tmp_path):
    path = tmp_path / "fruit.txt"
    path.write_bytes(b"\xef\xbb\xbf# what they are\r\n\r\n apple \r\na photo of a {}.\r\npear\r\n{}, {}!")
    found = load_classes(str(path))
    assert found.names == ("apple", "pear")
    assert found.prompts() == [
        ["a photo of a apple.", "apple, apple!"],
        ["a photo of a pear.", "pear, pear!"],
    ]


def test_names_without_templates_get_those_of_clip(tmp_path):
    path = tmp_path / "fruit.txt"
    path.write_text("apple\na {strange} pear\n")
    found = load_classes(str(path))
    assert found.names == ("apple", "a {strange} pear")
    assert len(found.templates) == 80
    assert found.prompts()[0][:2] == ["a bad photo of a apple.", "a photo of many apple."]
    assert all("{}" not in prompt for prompts in found.prompts() for prompt in prompts)


def test_imagenet_is_built_in():
    import open_clip

    found = load_classes("imagenet")
    assert found.names == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert len(found.names) == 1000
    expected = [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert found.prompts()[0] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no class file .*: give a text file with one class name a line, or `imagenet`"),
        (b"", "holds no class names: write one a line"),
        (b"# only this\n\na photo of a {}\n", "holds no class names"),
        (b"apple\npear\nApple\n", "names the class 'apple' twice: keep one of the lines"),
        (b"t-shirt\nt shirt\n", "names the class 't shirt' twice"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8 text"),
        (b"ustar\0\0\0", "is not text"),
    ],
)
def test_what_is_wrong_with_a_class_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_classes(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_class_file(tmp_path):
    with pytest.raises(UserError, match=f"the class file {tmp_path} cannot be read: Is a directory"):
        load_classes(str(tmp_path))


class Words(nn.Module):
    """A text model after open_clip's manner: bags of words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(101, 16)
        self.largest = 0

    def tokenize(self, texts):
        rows = [torch.tensor([1 + crc32(word.encode()) % 100 for word in text.split()]) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def encode_text(self, tokens, normalize=False):
        self.largest = max(self.largest, len(tokens))
        found = (self.table(tokens) * (tokens > 0)[..., None]).sum(1)
        return F.normalize(found, dim=1) if normalize else found


@torch.no_grad()
def test_class_embeddings_are_those_of_open_clip_a_part_at_a_time():
    from open_clip import build_zero_shot_classifier

    model = Words()
    names = tuple(f"thing {place} of {place % 7}" for place in range(50))
    classes = Classes(names, load_classes("imagenet").templates)
    found = class_embeddings(lambda sentences: model.encode_text(model.tokenize(sentences)), classes)
    assert model.largest <= 256
    expected = build_zero_shot_classifier(model, model.tokenize, names, classes.templates).T
    torch.testing.assert_close(found, expected)


def test_labels_are_found_by_name_or_by_place():
    labels = ["Red-Apple", "pear tree", 2, None, " fig", 0]
    assert label_indices(labels, FRUIT, where="val").tolist() == [0, 1, 2, -1, 2, 0]
    assert label_indices(labels, FRUIT, where="val").dtype == torch.int64
    assert label_indices(["b"], Classes(("b", "B"), ("{}",)), where="val").tolist() == [0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([None, None], "val/*.tar holds no class labels: give data with a `class` in KEY.json"),
        ([], "val/*.tar holds no class labels"),
        (
            ["fig", "plum"],
            "val/*.tar has the label 'plum', which is none of the 3 classes of fruit.txt (red apple, "
            "Pear_tree, fig): give the class file that belongs to this data",
        ),
        ([3], "val/*.tar has the label 3, which is none of the 3 classes of fruit.txt"),
        ([-1], "val/*.tar has the label -1, which is none"),
        (["x" * 10**6 + "\n"], "val/*.tar has the label 'xxxxx"),
    ],
)
def test_labels_that_do_not_match_are_one_sentence(labels, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        label_indices(labels, FRUIT, where="val/*.tar")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("classes", [4, 9])
def test_accuracy_is_that_of_torchmetrics_over_the_labelled(classes):
    from torchmetrics.functional.classification import multiclass_accuracy

    random = torch.Generator().manual_seed(0)
    weights = F.normalize(torch.randn(classes, 8, generator=random), dim=1)
    labels = torch.randint(classes, (3000,), generator=random)
    images = F.normalize(weights[labels] + torch.randn(3000, 8, generator=random), dim=1)
    labels[::3] = -1
    found = accuracy(images, weights, labels)
    some = labels >= 0
    expected = {
        f"zero_shot_top{k}": pytest.approx(
            multiclass_accuracy(
                (images @ weights.T)[some], labels[some], num_classes=classes, average="micro", top_k=k
            ).item()
        )
        for k in ([1, 5] if classes > 5 else [1])
    }
    assert found == expected
    assert 0.3 < found["zero_shot_top1"] < 0.95


def test_a_class_scores_as_its_best_prompt():
    texts = torch.tensor([[1.0, 0.0], [-9.0, -9.0], [0.0, 1.0]])  # class 0's mean would lose everywhere
    images = torch.tensor([[1.0, 0.2], [0.1, 1.0]])
    assert best_prompt(images, texts, owner=torch.tensor([0, 0, 1])).tolist() == [0, 1]


def test_top1_counts_only_the_images_of_the_classes_asked_for():
    predicted, labels = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 2, 2])
    assert top1(predicted, labels, [0, 1]) == 1.0
    assert top1(predicted, labels, [2]) == 0.0
    assert top1(predicted, labels, [0, 1, 2]) == pytest.approx(0.5)
