"""The demo world's pictures and captions, read back without its code: both say what the labels say."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from stepdistill.demo.world import (
    ATTRIBUTES,
    COLOURS,
    PHRASES,
    TEST_SEED,
    TRAIN_SEED,
    World,
    caption,
    render,
    scene,
    tokens,
    values,
    variant,
    vocabulary,
)

SCENES = [scene(TEST_SEED, i) for i in range(400)]
Said = dict[str, str]

# --- a caption, read word by word

SYNONYMS = {
    "disc": "circle", "plus": "cross", "hoop": "ring", "turquoise": "cyan", "violet": "purple", "gray": "grey",
    "beige": "cream", "striped": "stripes", "checkered": "checks", "dotted": "dots",
}  # fmt: skip
RELATIONS = {  # the phrase, without "to the": the layout, and whether the thing named first is the first
    "left of": ("beside", True), "right of": ("beside", False),
    "above": ("stacked", True), "over": ("stacked", True), "on top of": ("stacked", True),
    "below": ("stacked", False), "under": ("stacked", False),
}  # fmt: skip
PAIR = re.compile(rf"(\w+) (\w+) (?:to the )?({'|'.join(RELATIONS)}) (?:a )?(\w+) (\w+)")
FILLING = {"a", "on", "with", "there", "is", "background", ","}


def heard(text: str) -> Said:
    """What a caption says, attribute by attribute."""
    (found,) = PAIR.finditer(text)
    c1, s1, relation, c2, s2 = (SYNONYMS.get(word, word) for word in found.groups())
    layout, in_order = RELATIONS[relation]
    (first, second) = ((c1, s1), (c2, s2)) if in_order else ((c2, s2), (c1, s1))
    rest = [SYNONYMS.get(word, word) for word in tokens(text[: found.start()] + " , " + text[found.end() :])]
    (ground,) = [word for word in rest if word in ATTRIBUTES["ground"]]
    (texture,) = [word for word in rest if word in ATTRIBUTES["texture"]]
    assert set(rest) - {ground, texture} <= FILLING, text
    return {
        "layout": layout, "first shape": first[1], "first colour": first[0], "second shape": second[1],
        "second colour": second[0], "ground": ground, "texture": texture,
    }  # fmt: skip


# --- a picture, read pixel by pixel


def nearest(colour: np.ndarray, names: tuple[str, ...]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(np.subtract(COLOURS[name], colour))))


def halves(mask: np.ndarray, axis: int) -> list[np.ndarray]:
    """The two objects, parted where along this axis there is least of them between their means."""
    profile, where = mask.sum(axis=1 - axis), np.arange(mask.shape[0])
    cut = float(profile @ where / profile.sum())
    for _ in range(20):
        low, high = (profile[side] @ where[side] / profile[side].sum() for side in (where < cut, where >= cut))
        cut = (low + high) / 2
    between = np.arange(int(low) + 1, int(high) + 1)
    quiet = between[np.argsort(profile[between] * 1000 + np.abs(between - cut))[0]]
    before = np.expand_dims(where < quiet, 1 - axis)
    return [mask & before, mask & ~before]


def shape_of(mask: np.ndarray) -> str:
    """From the harmonics of a silhouette about its centroid, three-, four- or five-fold, and from what is there."""
    y, x = np.nonzero(mask)
    cy, cx = y.mean(), x.mean()
    if not mask[round(cy), round(cx)]:
        return "ring"
    z = (x - cx) + 1j * (y - cy)
    size = np.sqrt(np.mean(np.abs(z) ** 2))
    fold = {k: abs(np.mean((z / size) ** k)) / np.mean(np.abs(z / size) ** k) for k in (3, 4, 5)}
    best = max(fold, key=lambda k: fold[k])
    if fold[best] < 0.1:
        return "circle"
    if best == 4:  # the polar moment is 1/6 of a square's area squared, and 0.199 of this cross's
        return "square" if size**2 / len(z) < 0.18 else "cross"
    return {3: "triangle", 5: "star"}[best]


def texture_of(level: np.ndarray, clear: np.ndarray) -> str:
    """From a ground's brightness [R, R] where it is clear of objects: one tone, one direction, or half of it bright."""
    if np.ptp(level[clear]) < 30:
        return "plain"
    gy, gx = np.gradient(level)
    inner = clear & np.roll(clear, 1, 0) & np.roll(clear, -1, 0) & np.roll(clear, 1, 1) & np.roll(clear, -1, 1)
    inner[[0, -1]] = inner[:, [0, -1]] = False
    xx, yy, xy = (np.mean(g[inner]) for g in (gx * gx, gy * gy, gx * gy))
    if np.hypot(xx - yy, 2 * xy) / (xx + yy) > 0.7:  # the structure tensor knows one direction alone
        return "stripes"
    middle = (level[clear].max() + level[clear].min()) / 2
    return "checks" if (level[clear] > middle).mean() > 0.4 else "dots"


def seen(image: np.ndarray) -> Said:
    """What a picture shows, attribute by attribute."""
    pixels = image.astype(np.float64)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    tones = rim[np.argsort(rim.sum(axis=1))]
    middle = (tones[len(tones) // 25] + tones[-len(tones) // 25]) / 2
    level = (pixels - middle).mean(axis=2)
    off = np.linalg.norm(pixels - middle - np.clip(level, -29, 29)[..., None], axis=2)
    mask = off > 45  # half of what parts an object's colour from any ground's
    spread = [np.var(index) for index in np.nonzero(mask)]
    layout, axis = ("stacked", 0) if spread[0] > spread[1] else ("beside", 1)
    said = {"layout": layout}
    for name, half in zip(("first", "second"), halves(mask, axis), strict=True):
        said[f"{name} shape"] = shape_of(half)
        said[f"{name} colour"] = nearest(np.median(pixels[half], axis=0), ATTRIBUTES["first colour"])
    return said | {"ground": nearest(middle, ATTRIBUTES["ground"]), "texture": texture_of(level, off < 15)}


# --- they agree


def attributes(s) -> Said:
    return dict(zip(ATTRIBUTES, values(s), strict=True))


@pytest.mark.parametrize("resolution", [64, 128])
def test_pictures_show_what_the_labels_say(resolution):
    for s in SCENES if resolution == 64 else SCENES[:60]:
        assert seen(render(s, resolution)) == attributes(s), s


def test_variants_show_it_too():
    for i, s in enumerate(SCENES[:60]):
        assert seen(render(variant(s, TEST_SEED, i, 0))) == attributes(s), s


def test_labels_are_the_indices_of_what_is_seen():
    table = World(TEST_SEED).labels(range(60)).tolist()
    for s, row in zip(SCENES, table, strict=False):
        said = seen(render(s))
        assert [ATTRIBUTES[name][i] for name, i in zip(ATTRIBUTES, row, strict=True)] == [said[n] for n in ATTRIBUTES]


def test_captions_say_what_the_picture_shows_from_either_side():
    sides = {layout: set() for layout in ATTRIBUTES["layout"]}
    for i, s in enumerate(SCENES):
        text = caption(s, TEST_SEED, i)
        assert heard(text) == seen(render(s)), text
        sides[s.layout].add(RELATIONS[PAIR.search(text)[3]][1])
    assert all(side == {True, False} for side in sides.values())


def test_mirrored_captions_name_the_objects_in_swapped_order():
    """The same picture described from both sides: "A left of B" and "B right of A"."""
    s = SCENES[0]
    one, two = (f"{thing.colour} {thing.shape}" for thing in (s.first, s.second))
    plain = {k: v for k, v in SYNONYMS.items() if v in ATTRIBUTES["first shape"] + ATTRIBUTES["first colour"]}
    seen_orders = set()
    for i in range(60):
        text = caption(s, TEST_SEED, i)
        words = " ".join(plain.get(word, word) for word in tokens(text))
        in_order = RELATIONS[PAIR.search(text)[3]][1]
        assert (words.index(one) < words.index(two)) == in_order, text
        seen_orders.add(in_order)
    assert seen_orders == {True, False}


def test_captions_hold_to_the_attributes_of_many_more_scenes():
    for i in range(3000):
        s = scene(TRAIN_SEED, i)
        text = caption(s, TRAIN_SEED, i)
        assert heard(text) == attributes(s), text


def test_every_way_of_saying_it_is_used_about_as_often():
    """Template, relation and point of view are drawn for each caption: shares within six deviations of their own."""
    count = 4000
    texts = [caption(SCENES[i % len(SCENES)], TEST_SEED, 10_000 + i) for i in range(count)]

    def check(found: list[str], shares: dict[str, float]) -> None:
        assert set(found) == set(shares)
        for name, share in shares.items():
            assert abs(found.count(name) - count * share) < 6 * (count * share * (1 - share)) ** 0.5, name

    def template(text: str) -> str:
        for sign in ("there is a ", "on ", " with a "):
            if text.startswith(sign) or (sign == " with a " and sign in text):
                return sign
        return "article" if f" {PAIR.search(text)[3]} a " in text else "none"

    check([template(text) for text in texts], dict.fromkeys(("there is a ", "on ", " with a ", "article", "none"), 0.2))
    beside = sum(s.layout == "beside" for s in SCENES) / len(SCENES)
    left, first, second = beside / 4, (1 - beside) / 6, (1 - beside) / 4
    shares = dict.fromkeys(("left of", "to the left of", "right of", "to the right of"), left)
    shares |= dict.fromkeys(("above", "over", "on top of"), first) | dict.fromkeys(("below", "under"), second)
    check([("to the " if f" to the {PAIR.search(t)[3]}" in t else "") + PAIR.search(t)[3] for t in texts], shares)


def test_the_demos_own_prompts_are_captions():
    config = Path(__file__).parents[2] / "recipes" / "configs" / "lcm_lora_demo.yaml"
    prompts = yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["validation_prompts"]
    for prompt in prompts:
        assert set(heard(prompt)) == set(ATTRIBUTES) and set(tokens(prompt)) <= set(vocabulary()), prompt


def test_phrases_are_unambiguous():
    for options in PHRASES.values():
        phrases = [phrase for synonyms in options.values() for phrase in synonyms]
        assert len(set(phrases)) == len(phrases)
    assert list(PHRASES) == list(ATTRIBUTES)


def test_vocabulary_is_exactly_what_captions_use():
    texts = (caption(SCENES[i % len(SCENES)], TRAIN_SEED, i) for i in range(3000))
    assert tuple(sorted({token for text in texts for token in tokens(text)})) == vocabulary()
    assert len(vocabulary()) == 51
    assert all(re.fullmatch(r"[a-z]+|,", word) for word in vocabulary())
    assert tokens("A ring,a Disc") == ["a", "ring", ",", "a", "disc"]
