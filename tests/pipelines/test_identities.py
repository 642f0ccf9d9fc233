"""Tracks that drift are cut down, mislabelled videos are found, and no person or video is on two sides of the split."""

import hashlib
import itertools
from dataclasses import replace

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.frozen.detector import load_detector
from models.frozen.identity import load_embedder
from models.frozen.landmarks import load_landmarker
from pipelines.crops import SCORE_COLUMNS
from pipelines.identities import (
    SAME_PERSON,
    STRICTNESS,
    Candidate,
    IdentitiesConfig,
    Twins,
    advise_test_share,
    agreeing,
    compare_videos,
    decide,
    embed,
    find_twins,
    hash_share,
    mean,
    same_as_most,
    split_identities,
)
from pipelines.schema import (
    Cause,
    Track,
    Video,
    from_json,
    npy_array,
    npy_bytes,
    reject_track,
    to_json,
)
from tests.material import SHARED, needs_shared

DLIB = IdentitiesConfig()
ARCFACE = IdentitiesConfig(embedder="mobilefacenet")
NO_TWINS = replace(ARCFACE, min_twin_cosine=1.0)
"""For tests where everybody has one face, because it is about something else."""


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# One track


class Painted:
    """Knows a person by the colour of the crop: a vector of the mean colour, plus a little of every landmark."""

    dimension = 5
    same_person = 0.9

    def __init__(self):
        self.calls = []

    def embed(self, crops, landmarks):
        assert len(crops) == len(landmarks)
        self.calls.append(len(crops))
        rows = [
            [*crop.mean(axis=(0, 1)) / 255 - 0.5, *points.mean(axis=0) / 1e4]
            for crop, points in zip(crops, landmarks, strict=True)
        ]
        return unit(np.array(rows)).astype(np.float32)


RED, BLUE, GREEN = (230, 20, 20), (20, 20, 230), (20, 230, 20)


def painted_video(*tracks, identity="anna", video="one"):
    """A video whose tracks are lists of colours, a frame each, every third frame of the source kept."""
    row = Video(identity=identity, video=video)
    members = []
    for number, colours in enumerate(tracks):
        indices = tuple(range(7, 7 + 3 * len(colours), 3))
        track = Track(
            name=f"{number:03d}",
            span="00001",
            indices=indices,
            times=tuple(index / 25 for index in indices),
            boxes=tuple((float(index), 0.0, 50.0, 50.0) for index in indices),
            box_scores=(0.9,) * len(indices),
            scores={"inside": 1.0, "shift": 2.0},
        )
        row = replace(row, tracks=(*row.tracks, track))
        key = row.track_key(track)
        rows = np.arange(len(colours), dtype=np.float32)
        members.append((f"{key}.landmarks.npy", npy_bytes(np.tile(rows, (2, 68, 1)).T)))
        scores = np.tile(rows, (len(SCORE_COLUMNS), 1)).T
        members.append((f"{key}.scores.npy", npy_bytes(scores)))
        for index, colour in zip(indices, colours, strict=True):
            picture = np.full((16, 16, 3), colour[::-1], dtype=np.uint8)
            members.append((f"{key}.{index:06d}.jpg", cv2.imencode(".jpg", picture)[1].tobytes()))
    return row, members


CONFIG = IdentitiesConfig(min_frame_cosine=0.9)


def test_one_person_is_kept_whole():
    video, members = painted_video([RED] * 150)
    embedder = Painted()
    out, kept = embed(video, members, embedder, CONFIG)
    (track,) = out.tracks
    content = dict(kept)
    vectors = npy_array(content.pop("anna-one-000.embedding.npy"))
    assert content == dict(members)
    assert vectors.shape == (150, 5)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(track.embedding, unit(vectors.mean(axis=0)), atol=1e-5)
    assert track.scores["same_person"] > 0.99
    assert track.scores["shift"] == 2.0
    assert track.dropped == {}
    assert max(embedder.calls) <= 64
    assert out.versions["identity"].startswith("dlib ")
    assert from_json(to_json(out)) == out


@pytest.mark.parametrize("first", [0, 10, 20])
def test_frames_of_somebody_else_go_everywhere_at_once(first):
    colours = [RED] * 30
    colours[first : first + 8] = [BLUE] * 5 + [GREEN] * 3
    video, members = painted_video(colours)
    out, kept = embed(video, members, Painted(), CONFIG)
    (track,) = out.tracks
    stays = [i for i in range(30) if colours[i] == RED]
    assert track.state == "open"
    assert track.indices == tuple(video.tracks[0].indices[i] for i in stays)
    assert track.boxes == tuple(video.tracks[0].boxes[i] for i in stays)
    assert track.dropped == {"identity: drift": 8}
    assert track.scores["sharpness"] == np.median(stays)
    content = dict(kept)
    np.testing.assert_array_equal(npy_array(content["anna-one-000.scores.npy"])[:, 0], stays)
    assert len(npy_array(content["anna-one-000.embedding.npy"])) == 22
    pictures = [name for name in content if name.endswith(".jpg")]
    assert pictures == [f"anna-one-000.{index:06d}.jpg" for index in track.indices]


def test_without_a_clear_majority_the_track_goes_and_the_others_stay():
    video, members = painted_video([RED] * 14 + [BLUE] * 10, [BLUE] * 12, [GREEN] * 5 + [RED] * 3)
    bad = reject_track(Track(name="span-000", span="x"), Cause.LIST_BOXES, "NaN")
    video = replace(video, tracks=(bad, *video.tracks))
    out, kept = embed(video, members, Painted(), CONFIG)
    assert [track.state for track in out.tracks] == ["rejected", "rejected", "open", "rejected"]
    assert out.tracks[0] == bad
    assert out.tracks[1].cause == Cause.IDENTITY_DRIFT
    assert "14 of 24 frames" in out.tracks[1].detail
    assert "5 of 8 frames" in out.tracks[3].detail
    assert {name.split(".")[0] for name, _ in kept} == {"anna-one-001"}
    assert out.live


def test_a_video_without_a_track_left_is_rejected():
    video, members = painted_video([RED] * 14 + [BLUE] * 10)
    out, kept = embed(video, members, Painted(), CONFIG)
    assert (out.state, out.cause) == ("rejected", Cause.IDENTITY_DRIFT)
    assert "14 of 24 frames" in out.detail
    assert kept == []


@given(seed=st.integers(0, 10**6), num_others=st.integers(0, 39), noise=st.floats(0.01, 0.5))
@settings(max_examples=40, deadline=None)
def test_the_majority_is_found_in_any_order(seed, num_others, noise):
    generator = np.random.default_rng(seed)
    people = unit(generator.normal(size=(2, 128)))
    who = generator.permutation(np.repeat([0, 1], [100 - num_others, num_others]))
    vectors = unit(people[who] + noise * unit(generator.normal(size=(100, 128))))
    np.testing.assert_array_equal(agreeing(vectors, np.ones(100), 0.44), who == 0)


# All tracks


def candidate(identity, video, vector, frames=100, split="", track=0, sources=None):
    return Candidate(
        key=f"{identity}-{video}-{track:03d}",
        identity=identity,
        video=video,
        sources=(f"https://e.org/{video}",) if sources is None else sources,
        frames=frames,
        split=split,
        embedding=vector,
    )


class People:
    """Mean embeddings of made-up people, as spread as the embedder's are on real clips."""

    def __init__(self, embedder, seed=0):
        self.generator = np.random.default_rng(seed)
        # dlib's vectors share a large mean: 0.84 between people, 0.98 within one; ArcFace's 0.0 and 0.75
        self.shared, self.within = {"dlib": (0.84, 0.97), "mobilefacenet": (0.0, 0.7)}[embedder]
        self.mean = self._random()

    def _random(self, *shape):
        return unit(self.generator.normal(size=(*shape, 128)))

    def person(self):
        shared = np.sqrt(self.shared)
        return shared * self.mean + np.sqrt(1 - shared**2) * self._random()

    def seen(self, person):
        """A track of a person: two of one person have the cosine ``within`` on average."""
        within = np.sqrt(self.within)
        return unit(within * person + np.sqrt(1 - within**2) * self._random())


def causes(decisions):
    return {key: decision.cause for key, decision in decisions.items() if decision.cause}


@pytest.mark.parametrize("config", [DLIB, ARCFACE], ids=lambda config: config.embedder)
@pytest.mark.parametrize("num_videos", [4, 7])
def test_every_mislabelled_video_is_found_and_no_other(config, num_videos):
    people = People(config.embedder)
    candidates, wrong = [], set()
    for number in range(150):
        person, stranger = people.person(), people.person()
        mistaken = int(people.generator.integers(num_videos))
        for video in range(num_videos):
            shown = stranger if video == mistaken else person
            for track in range(int(people.generator.integers(1, 4))):
                item = candidate(
                    f"id{number:05d}", f"v{number}_{video}", people.seen(shown), 100, "", track
                )
                candidates.append(item)
                if video == mistaken:
                    wrong.add(item.key)
    decisions = decide(candidates, config)
    assert causes(decisions) == dict.fromkeys(wrong, Cause.IDENTITY_DISAGREES)
    assert len(decisions) == len(candidates)
    some = next(decisions[key] for key in wrong)
    assert f"{num_videos - 1} other videos" in some.detail


def test_the_order_of_the_candidates_does_not_matter():
    people = People("dlib")
    persons = [people.person() for _ in range(6)]
    candidates = [
        candidate(f"id{i}", f"v{v}", people.seen(persons[(i + (v == i)) % 6]), 10 + v, sources=())
        for i, v in itertools.product(range(6), range(5))
    ]
    expected = decide(candidates, DLIB)
    assert any(expected[item.key].cause for item in candidates)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(candidates))
        assert decide([candidates[i] for i in order], DLIB) == expected


def faces(*shown, frames=None):
    """Videos a, b, c, ... of one identity; ``shown`` numbers the people in them."""
    people = People("mobilefacenet", seed=3)
    persons = [people.person() for _ in range(10)]
    frames = frames or [100] * len(shown)
    return [
        candidate("anna", "abcdefgh"[i], people.seen(persons[who]), frames[i])
        for i, who in enumerate(shown)
    ]


@pytest.mark.parametrize(
    ("shown", "frames", "gone"),
    [
        ([0], [100], ""),  # one video: nothing to compare with
        ([0, 0], [100, 50], ""),
        ([0, 1], [100, 50], "b"),  # two that disagree: the one with more frames stays
        ([0, 1], [50, 100], "a"),
        ([0, 1], [50, 50], "b"),  # a tie: the first by name
        ([0, 0, 1], [10, 10, 900], "c"),  # three: the majority of videos, not of frames
        ([0, 1, 2], [50, 100, 60], "ac"),  # nobody agrees: most frames
        ([0, 0, 1, 1], [10, 10, 11, 11], "ab"),  # two against two: most frames
        ([0, 0, 1, 1, 1], [99, 99, 11, 11, 11], "ab"),
        ([0, 0, 0, 1, 2, 3], [9] * 6, "def"),
    ],
)
def test_few_videos(shown, frames, gone):
    decisions = decide(faces(*shown, frames=frames), ARCFACE)
    assert {key.split("-")[1] for key in causes(decisions)} == set(gone)
    assert set(causes(decisions).values()) <= {Cause.IDENTITY_DISAGREES}


def test_a_track_is_compared_with_the_other_videos_and_not_with_its_own():
    """By hand: 0.75 from two others that are alike. With its own video in the mean it would be 0.90."""
    anna = np.array([1.0, 0.0, 0.0])
    apart = np.array([0.75, np.sqrt(1 - 0.75**2), 0.0])
    tracks = [candidate("anna", "a", anna), candidate("anna", "b", anna)]
    tracks.append(candidate("anna", "c", apart))
    cosines, others = compare_videos(tracks, 0.7)
    alike = float(unit(anna + apart) @ anna)  # a: compared with b and c
    assert cosines == pytest.approx([alike, alike, 0.75], abs=1e-5)
    assert others.tolist() == [2, 2, 2]


def test_agreeing_at_the_threshold_is_enough_and_below_is_not():
    vectors = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert agreeing(vectors, [2, 1], 0.6).tolist() == [True, True]
    assert agreeing(vectors, [2, 1], 0.600002).tolist() == [True, False]
    # frames of a track: nine alike, one that is a little less like their mean than it must be
    others = np.array([[1.0, 0.0]] * 9 + [[0.6, 0.8]])
    assert same_as_most(others, 0.62)[0].tolist() == [True] * 9 + [False]


def test_frames_of_strangers_make_no_video_the_core():
    """a shows somebody for 40 frames and strangers for 60, b somebody else for 50: b is the larger one."""
    one, two, *rest = np.eye(5)
    tracks = [candidate("anna", "a", one, 40), candidate("anna", "b", two, 50)]
    tracks += [candidate("anna", "a", who, 20, track=i) for i, who in enumerate(rest, 1)]
    gone = causes(decide(tracks, replace(ARCFACE, split="legacy")))
    assert set(gone) == {f"anna-a-{i:03d}" for i in range(4)}


def test_tracks_of_a_single_video_are_compared_with_each_other():
    people = People("mobilefacenet")
    anna, bert = people.person(), people.person()
    shown = [(anna, 60), (bert, 100), (anna, 50)]
    candidates = [
        candidate("anna", "a", people.seen(who), frames, track=i)
        for i, (who, frames) in enumerate(shown)
    ]
    decisions = decide(candidates, ARCFACE)
    assert list(causes(decisions)) == ["anna-a-001"]
    assert "the rest of the video" in decisions["anna-a-001"].detail


def test_a_stranger_inside_a_good_video_is_found_by_the_other_videos():
    people = People("mobilefacenet")
    anna, bert = people.person(), people.person()
    candidates = [candidate("anna", name, people.seen(anna)) for name in "abc"]
    candidates.append(candidate("anna", "a", people.seen(bert), frames=500, track=1))
    assert list(causes(decide(candidates, ARCFACE))) == ["anna-a-001"]


def test_small_identities_go():
    config = replace(ARCFACE, min_identity_videos=2, min_identity_frames=150)
    people = People("mobilefacenet")
    anna, bert, carl = people.person(), people.person(), people.person()
    candidates = [candidate("anna", name, people.seen(anna), 90) for name in "ab"]
    candidates += [candidate("bert", "c", people.seen(bert), 900)]
    candidates += [candidate("bert", "c", people.seen(bert), 900, track=1)]  # two tracks, one video
    candidates += [candidate("carl", name, people.seen(carl), 70) for name in "de"]
    assert causes(decide(candidates, config)) == {
        "bert-c-000": Cause.IDENTITY_FEW_VIDEOS,
        "bert-c-001": Cause.IDENTITY_FEW_VIDEOS,
        "carl-d-000": Cause.IDENTITY_FEW_FRAMES,
        "carl-e-000": Cause.IDENTITY_FEW_FRAMES,
    }


# The split

ONE = np.eye(128)[0]


def test_a_legacy_split_is_the_lists_people_on_both_sides_and_all():
    shown = [("a", "train"), ("b", "test"), ("c", "")]
    tracks = [replace(candidate("anna", video, ONE), split=side) for video, side in shown]
    clean = decide(tracks, NO_TWINS)
    assert causes(clean) == {"anna-a-000": Cause.IDENTITY_SPLIT_LEAK}
    legacy = decide(tracks, replace(NO_TWINS, split="legacy"))
    assert causes(legacy) == {}
    assert [legacy[track.key].split for track in tracks] == ["train", "test", "test"]


def test_hash_split_is_stable_and_has_the_share_asked_for():
    names = [f"id{number:05d}" for number in range(20_000)]
    shares = np.array([hash_share(name) for name in names])
    assert abs((shares < 0.05).mean() - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 20_000)
    # nobody may change sides from one release to the next: the first 64 bits of sha256, as sha256sum prints them
    assert hash_share("id00000") == 0x327B4F3831EAA844 / 2**64


@pytest.mark.parametrize("count", [2, 3, 4, 13, 60])
def test_advised_share_splits_people_who_would_be_on_one_side(count):
    names = [f"id{number}" for number in range(count)]
    shares = [hash_share(name) for name in names]
    advised = advise_test_share(names, min(shares))
    assert advised is not None
    decisions = decide([candidate(name, f"v{name}", ONE) for name in names],
                       replace(NO_TWINS, test_share=advised))  # fmt: skip
    tested = sum(decision.split == "test" for decision in decisions.values())
    assert tested == max(1, round(count / 5))
    assert advise_test_share(names, advised) is None
    assert advise_test_share(names, 0.0) is None
    assert advise_test_share(names[:1], min(shares)) is None


def test_official_splits_are_kept():
    candidates = [candidate(f"id{i}", f"v{i}", ONE, split=s) for i, s in enumerate(STRICTNESS)]
    decisions = decide(candidates, replace(NO_TWINS, test_share=0.0))
    assert [decisions[c.key].split for c in candidates] == ["train", "train", "val", "test"]


def test_one_video_under_two_names_stays_on_the_side_that_is_tested():
    candidates = [
        candidate("anna", "shared", ONE, split="test"),
        candidate("bert", "shared", ONE, split="train"),
        candidate("bert", "own", ONE, split="train"),
        # another URL, but the same bytes
        candidate("carl", "copy", ONE, split="val", sources=("u", "sha")),
        candidate("dora", "original", ONE, split="train", sources=("w", "sha")),
    ]
    decisions = decide(candidates, NO_TWINS)
    assert causes(decisions) == {
        "bert-shared-000": Cause.IDENTITY_SPLIT_LEAK,
        "dora-original-000": Cause.IDENTITY_SPLIT_LEAK,
    }
    assert "in test as anna" in decisions["bert-shared-000"].detail
    assert decisions["bert-own-000"].split == "train"


def test_one_person_listed_on_two_sides_stays_on_the_side_that_is_tested():
    candidates = [
        candidate("anna", "a", ONE, split="test"),
        candidate("anna", "b", ONE, split="train"),
        candidate("anna", "c", ONE),
        candidate("bert", "b", ONE, split="train"),
    ]
    decisions = decide(candidates, NO_TWINS)
    assert causes(decisions) == {"anna-b-000": Cause.IDENTITY_SPLIT_LEAK}
    assert decisions["anna-c-000"].split == "test"
    assert decisions["bert-b-000"].split == "train"


def test_without_official_splits_people_who_share_videos_go_together():
    names = [f"id{number:03d}" for number in range(200)]
    rows = [candidate(name, f"v{number // 2}", ONE) for number, name in enumerate(names)]
    rows += [candidate(name, f"w{number // 4}", ONE) for number, name in enumerate(names)]
    decisions = decide(rows, replace(NO_TWINS, test_share=0.3))
    assert not causes(decisions)
    sides = [decisions[row.key].split for row in rows]
    assert set(sides) == {"train", "test"}
    for first in range(0, 200, 4):
        assert len(set(sides[first : first + 4])) == 1


@given(
    shared=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12),
    twins=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_people_who_hang_together_are_hashed_by_the_first_of_their_names(shared, twins):
    """Groups by spreading the first name until nothing changes. Who joins a group later in the alphabet moves nobody."""
    names = [f"id{number}" for number in range(10)]
    rows = [candidate(name, f"own{name}", ONE) for name in names]
    rows += [
        candidate(names[i], f"v{number}", ONE, sources=(f"v{number}",))
        for number, pair in enumerate(shared)
        for i in pair
    ]
    pairs = [(min(pair), max(pair)) for pair in twins if pair[0] != pair[1]]
    found = split_identities(
        rows, 0.5, [Twins(one=names[i], other=names[j], cosine=0.9) for i, j in pairs]
    )
    first = dict(zip(range(10), range(10), strict=True))
    for _ in range(10):
        for i, j in [*shared, *pairs]:
            first[i] = first[j] = min(first[i], first[j])
    share = {
        name: int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16 for name in names
    }
    expected = {names[i]: "test" if share[names[first[i]]] < 0.5 else "train" for i in range(10)}
    assert found == expected


def test_one_person_under_two_names_goes_to_one_side():
    anna, bert = np.eye(128)[:2]
    names = [f"id{number:03d}" for number in range(100)]
    people = unit(np.random.default_rng(3).normal(size=(50, 128)))
    rows = [candidate(name, f"v{name}", people[i // 2]) for i, name in enumerate(names)]
    decisions = decide(rows, replace(ARCFACE, test_share=0.3))
    assert not causes(decisions)
    sides = [decisions[row.key].split for row in rows]
    assert sides[::2] == sides[1::2]
    assert set(sides) == {"train", "test"}

    listed = [
        candidate("anna", "a", anna, split="train"),
        candidate("anya", "b", unit(anna + 0.2 * bert), split="test"),
        candidate("bert", "c", bert, split="train"),
    ]
    means = {item.identity: mean([item]) for item in listed}
    assert find_twins(means, 0.72) == [Twins(one="anna", other="anya", cosine=0.980581)]
    decisions = decide(listed, ARCFACE)
    assert causes(decisions) == {"anna-a-000": Cause.IDENTITY_SPLIT_LEAK}
    assert decisions["anna-a-000"].detail == "looks like anya of test, cosine 0.981"


def test_thresholds_are_the_embedders_own_and_twins_are_halfway_to_one():
    for embedder, same in SAME_PERSON.items():
        config = IdentitiesConfig(embedder=embedder)
        assert config.frame_threshold == config.video_threshold == same
        assert 1 - config.twin_threshold == pytest.approx((1 - same) / 2)
    given = IdentitiesConfig(min_frame_cosine=0.1, min_video_cosine=0.2, min_twin_cosine=0.3)
    assert (given.frame_threshold, given.video_threshold, given.twin_threshold) == (0.1, 0.2, 0.3)


def test_twins_do_not_depend_on_how_many_are_compared_at_once(monkeypatch):
    people = unit(np.random.default_rng(5).normal(size=(30, 128)))
    means = {f"id{i:02d}": people[i % 17] for i in range(30)}
    found = find_twins(means, 0.9)
    assert {(pair.one, pair.other) for pair in found} == {
        (f"id{i:02d}", f"id{i + 17:02d}") for i in range(13)
    }
    monkeypatch.setattr("pipelines.identities.IDENTITIES_AT_ONCE", 7)
    assert find_twins(means, 0.9) == found


def test_the_mean_of_an_identity_counts_frames():
    one, other = np.eye(128)[:2]
    tracks = [candidate("anna", "a", one, frames=30), candidate("anna", "b", other, frames=10)]
    np.testing.assert_allclose(mean(tracks), unit(3 * one + other), atol=1e-12)


rows_of_a_list = st.lists(
    st.tuples(
        st.integers(0, 7), st.integers(0, 9), st.integers(0, 9), st.sampled_from(sorted(STRICTNESS))
    ),
    max_size=40,
    unique_by=lambda row: row[:2],
)


@given(rows=rows_of_a_list, share=st.floats(0, 0.9), minimum=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_nobody_and_nothing_is_ever_on_two_sides(rows, share, minimum):
    candidates = [
        candidate(
            f"id{i}", f"v{v}", np.eye(128)[i // 2], split=split, sources=(f"url{v}", f"sha{s}")
        )
        for i, v, s, split in rows
    ]
    config = replace(ARCFACE, test_share=share, min_identity_videos=minimum)
    decisions = decide(candidates, config)
    assert set(decisions) == {item.key for item in candidates}
    stays = [item for item in candidates if not decisions[item.key].cause]
    for name in ("identity", "video", "sources", "embedding"):
        sides = {}
        for item in stays:
            values = item.embedding.tobytes() if name == "embedding" else getattr(item, name)
            for value in values if name == "sources" else [values]:
                side = decisions[item.key].split
                assert side in ("train", "val", "test")
                assert sides.setdefault(value, side) == side
    for item in stays:
        assert item.split in ("", decisions[item.key].split)
        assert len({other.video for other in stays if other.identity == item.identity}) >= minimum
    if not any(split for *_, split in rows):
        assert Cause.IDENTITY_SPLIT_LEAK not in causes(decisions).values()


def test_nothing_gives_nothing():
    assert decide([], DLIB) == {}
    assert split_identities([], 0.5) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"min_majority": 0.5},
        {"test_share": 1.0},
        {"min_twin_cosine": 1.1},
        {"min_frame_cosine": 1.5},
        {"min_track_frames": 0},
    ],
)
def test_bad_settings_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        IdentitiesConfig(**change)


# Real people


@pytest.fixture(scope="module")
def real_faces():
    """Function: pictures → (pictures with a face, their landmarks (n, 68, 2)) of the largest face."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRAY_WEIGHTS", str(SHARED / "weights"))
        detector, landmarker = load_detector("yunet", 40), load_landmarker("dlib")

        def find(pictures):
            found = []
            for picture in pictures:
                boxes = detector.detect(picture)
                box = boxes[[np.argmax(boxes[:, 2] - boxes[:, 0])], :4]
                found.append(landmarker.locate(picture, box)[0])
            return np.array(found, dtype=np.float32)

        yield find


def clip(name, count):
    """The first ``count`` frames of a shared clip, half as large."""
    with av.open(str(SHARED / "videos" / name)) as container:
        frames = itertools.islice(container.decode(video=0), count)
        pictures = [frame.to_ndarray(format="rgb24") for frame in frames]
    return [cv2.resize(picture, None, fx=0.5, fy=0.5) for picture in pictures]


@needs_shared
@pytest.mark.real
@pytest.mark.parametrize("name", ["dlib", "mobilefacenet"])
def test_a_real_change_of_person_is_cut_off(real_faces, name):
    pictures = clip("m003_a.mp4", 10) + clip("w036_a.mp4", 4)
    landmarks = real_faces(pictures)
    video, members = painted_video([RED] * 14)
    content = dict(members)
    content["anna-one-000.landmarks.npy"] = npy_bytes(landmarks)
    for index, picture in zip(video.tracks[0].indices, pictures, strict=True):
        encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
        content[f"anna-one-000.{index:06d}.jpg"] = encoded.tobytes()
    config = IdentitiesConfig(embedder=name)
    out, kept = embed(video, list(content.items()), load_embedder(name), config)
    (track,) = out.tracks
    assert track.indices == video.tracks[0].indices[:10]
    assert npy_array(dict(kept)["anna-one-000.embedding.npy"]).shape == (10, 128)


@needs_shared
@pytest.mark.real
@pytest.mark.parametrize("name", ["dlib", "mobilefacenet"])
def test_real_photos_under_a_wrong_name_are_found(real_faces, name):
    """Each photo stands for a video of its person; every person has one photo of the next person among theirs."""
    files = sorted((SHARED / "photos").glob("*.jpg"))
    small = cv2.IMREAD_REDUCED_COLOR_2
    pictures = [cv2.cvtColor(cv2.imread(str(file), small), cv2.COLOR_BGR2RGB) for file in files]
    vectors = load_embedder(name).embed(pictures, real_faces(pictures))
    named = {file.stem: vector for file, vector in zip(files, vectors, strict=True)}
    people = sorted({stem[:3] for stem in named})
    right = [candidate(stem[:3], stem, vector) for stem, vector in named.items()]
    wrong = [
        candidate(person, f"{other}_a", named[f"{other}_a"], sources=())
        for person, other in zip(people, people[1:] + people[:1], strict=True)
    ]
    decisions = decide(right + wrong, IdentitiesConfig(embedder=name))
    assert set(causes(decisions)) == {item.key for item in wrong}
