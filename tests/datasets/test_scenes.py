import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from datasets.drawing import COLOURS, NUMBERS, SHAPES, Thing, box, draw
from datasets.scenes import COMBINATIONS, NUMERALS, SEEN, SIZES, UNSEEN, Scenes, prompts
from datasets.views import Augment

WORDS = {"one": 1} | {word: i + 1 for i, word in enumerate(NUMERALS)}
MENTION = re.compile(rf"({'|'.join(NUMERALS)}) ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) (\w+)")


def read(scenes, index, resolution=64):
    return scenes.read(index, seed=(1, 2), resolution=resolution, augment=Augment())


def pixels(sample):
    assert sample.image is not None
    return sample.image.numpy()


def kind(thing):
    return list(SIZES)[thing.size], list(COLOURS)[thing.colour], SHAPES[thing.shape]


def parse(caption):
    """The multiset of objects that a caption names, by a reader that shares no code with the writer."""
    found = Counter()
    for many, size, colour, noun in MENTION.findall(caption):
        shape = next(s for s in SHAPES if noun in ((s,) if many == "a" else (s + "s", s + "es")))
        found[size, colour, shape] += WORDS[many]
    return found


def test_a_scene_is_a_pure_function_of_seed_split_and_index():
    one, same = Scenes(seed=3), Scenes(seed=3)
    a, b = read(one, 11), read(same, 11)
    read(one, 12)
    again = one.read(11, seed=(9,), resolution=64)
    for other in (b, again):
        assert np.array_equal(pixels(a), pixels(other))
        assert (a.captions, a.phrases, a.key) == (other.captions, other.phrases, other.key)
    for other in (Scenes(seed=4), Scenes(seed=3, split="test")):
        assert not np.array_equal(pixels(a), pixels(read(other, 11)))
    assert pixels(a).shape == (3, 64, 64)
    assert not a.fault


def test_threads_read_the_same_bits():
    scenes = Scenes()
    alone = [pixels(read(scenes, i)).tobytes() for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: pixels(read(scenes, i)).tobytes(), list(range(64)) * 4))
    assert together == alone * 4


def test_captions_name_exactly_what_there_is():
    scenes = Scenes()
    for i in range(2000):
        scene = scenes.scene(i)
        assert parse(scene.caption) == Counter(map(kind, scene.things)), scene.caption


def test_relations_hold_between_every_pair_of_the_two_mentions():
    scenes, seen = Scenes(), Counter()
    for i in range(3000):
        scene = scenes.scene(i)
        relation = next((r for r in (" left of ", " above ") if r in scene.caption), None)
        seen[relation] += 1
        if relation is None:
            continue
        first, second = (set(parse(part)) for part in scene.caption.split(relation))
        for a in (t for t in scene.things if kind(t) in first):
            for b in (t for t in scene.things if kind(t) in second):
                across, down = b.x - a.x, b.y - a.y
                assert (across if relation == " left of " else down) > 0, scene.caption
                if len(scene.things) == 2:  # and it is the evident one of the two
                    assert (abs(across) > abs(down)) == (relation == " left of "), scene.caption
    assert min(seen.values()) > 300


def test_two_equal_objects_are_counted_and_different_ones_are_related():
    scenes = Scenes(counts=(2,))
    for i in range(500):
        scene = scenes.scene(i)
        equal = kind(scene.things[0]) == kind(scene.things[1])
        assert scene.caption.startswith("two ") == equal
        assert (" left of " in scene.caption or " above " in scene.caption) != equal


def test_training_never_shows_an_unseen_combination_but_every_colour_and_shape():
    assert len(SEEN) == 40
    assert len(UNSEEN) == 8
    scenes, shown = Scenes(), Counter()
    for i in range(4000):
        shown.update((t.colour, t.shape) for t in scenes.scene(i).things)
    assert set(shown) == {COMBINATIONS[label] for label in SEEN}
    assert {c for c, _ in shown} == set(range(8))
    assert {s for _, s in shown} == set(range(6))
    with pytest.raises(AssertionError):
        Scenes(combinations="all")


def test_counts_are_drawn_in_their_shares():
    scenes = Scenes(counts=(1, 1, 1, 4))
    drawn = Counter(len(scenes.scene(i).things) for i in range(4000))
    assert set(drawn) == {1, 4}
    assert abs(drawn[1] / 4000 - 0.75) < 0.03


def test_single_object_test_set_holds_every_combination_evenly():
    scenes = Scenes(split="test", size=96, counts=(1,), combinations="all")
    labels = [scenes.label(i) for i in range(96)]
    assert Counter(labels) == dict.fromkeys(range(48), 2)
    for i in range(96):
        words = scenes.scene(i).caption
        assert words in prompts(labels[i])


def test_unseen_test_scenes_hold_unseen_combinations_alone():
    scenes = Scenes(split="test", size=200, counts=(2,), combinations="unseen")
    shown = {(t.colour, t.shape) for i in range(200) for t in scenes.scene(i).things}
    assert shown == {COMBINATIONS[label] for label in UNSEEN}


def test_a_distinct_set_repeats_no_caption():
    scenes = Scenes(split="test", size=300, distinct=True)
    captions = [read(scenes, i, 16).captions[0] for i in range(300)]
    assert len(set(captions)) == 300
    plain = [Scenes(split="test").scene(i).caption for i in range(300)]
    assert len(set(plain)) < 300
    assert captions == list(dict.fromkeys(Scenes(split="test").scene(i).caption for i in range(600)))[:300]


def test_prompts_are_captions_of_training_form():
    everything = [prompt for label in range(48) for prompt in prompts(label)]
    assert len(set(everything)) == 48 * len(SIZES)
    assert prompts(COMBINATIONS.index((0, 0))) == tuple(f"a {size} red circle" for size in SIZES)


def background(things, *, resolution=256):
    """Pixels of a scene without grain, and which of them its objects change."""
    numbers = np.random.default_rng(0).random(NUMBERS, dtype=np.float32)
    grain = np.zeros(resolution**2, np.uint8)
    with_, without = (draw(t, resolution=resolution, numbers=numbers, grain=grain) for t in (things, ()))
    return with_, (with_.astype(int) != without).any(0)


@pytest.mark.parametrize("resolution", [64, 256])
@pytest.mark.parametrize("counts", [(1,), (2,), (3,), (4,)])
def test_boxes_of_phrases_are_those_of_the_pixels(counts, resolution):
    scenes = Scenes(counts=counts)
    for i in range(12):
        scene = scenes.scene(i)
        assert [p.text for p in scene.phrases] == [m.group() for m in MENTION.finditer(scene.caption)]
        for phrase in scene.phrases:
            things = tuple(t for t in scene.things if kind(t) in parse(phrase.text))
            _, changed = background(things, resolution=resolution)
            rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
            found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(found - resolution * np.array(phrase.box)).max() < 2, (phrase, found)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_shapes_have_their_areas(shape):
    areas = {
        "circle": np.pi,
        "square": 1.68**2,
        "triangle": 1.15**2 * 3 * np.sqrt(3) / 4,
        "star": 5 * 1.18 * 0.5 * np.sin(np.pi / 5),
        "cross": 2 * 2.1 * 0.72 - 0.72**2,
        "ring": np.pi * (1 - 0.52**2),
    }
    dark = Thing(colour=5, shape=shape, size=2, x=0.5, y=0.5, radius=0.25, angle=0.3, tint=(0, 0, -0.4))
    images = [background((t,))[0][2].astype(float) for t in (dark, dark._replace(tint=(0, 0, 0)))]
    area = (images[1] - images[0]).sum() / (0.4 * 255) / 64**2
    assert abs(area / areas[SHAPES[shape]] - 1) < 0.02


def test_boxes_lie_in_the_image():
    scenes = Scenes()
    for i in range(2000):
        for thing in scenes.scene(i).things:
            x0, y0, x1, y1 = box(thing)
            assert x0 >= 0
            assert y0 >= 0
            assert x1 <= 1
            assert y1 <= 1


def test_objects_are_as_large_as_their_size_says():
    scenes = Scenes()
    for i in range(1000):
        for thing in scenes.scene(i).things:
            low, high = list(SIZES.values())[thing.size]
            assert low <= thing.radius <= high


def test_another_resolution_shows_the_same_scene():
    scenes = Scenes()
    for i in range(10):
        small = pixels(read(scenes, i, 64)).astype(float)
        large = pixels(read(scenes, i, 256)).astype(float)
        pooled = large.reshape(3, 64, 4, 64, 4).mean((2, 4))
        assert np.abs(small - pooled).mean() < 9
        assert read(scenes, i, 64).captions == read(scenes, i, 256).captions


def test_the_ground_is_cluttered():
    scenes = Scenes()
    for i in range(20):
        empty = pixels(read(scenes, i)).astype(float)
        assert empty.std((1, 2)).min() > 8


def test_fingerprints_tell_sets_apart():
    sets = [
        Scenes(),
        Scenes(seed=1),
        Scenes(split="test"),
        Scenes(split="test", size=5),
        Scenes(split="test", size=5, distinct=True),
        Scenes(counts=(1,)),
        Scenes(split="test", combinations="all"),
    ]
    assert len({s.fingerprint for s in sets}) == len(sets)
    assert Scenes().fingerprint == Scenes().fingerprint


def test_paint_covers_what_lies_below():
    below = Thing(colour=0, shape=0, size=2, x=0.5, y=0.5, radius=0.2, angle=0, tint=(0, 0, 0))
    image, _ = background((below, below._replace(colour=5)))
    assert np.array_equal(image[:, 128, 128], (255 * np.array(COLOURS["blue"], np.float32)).astype(np.uint8))


def test_a_side_that_is_no_multiple_of_anything():
    image = read(Scenes(seed=3), 5, resolution=37).image
    assert image is not None
    assert image.shape == (3, 37, 37)
