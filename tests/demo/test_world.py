"""The toy world: the same for ever from its seed, objects bounce, and hide behind the pillar."""

import hashlib

import numpy as np
import pytest

from vllm_packcache.demo import world
from vllm_packcache.demo.world import GRID, OBJECT_CELLS, make_film, make_world, palette

SEEDS = range(40)


def test_same_seed_same_video():
    for seed in SEEDS:
        one, two = make_world(seed), make_world(seed)
        assert one == two
        assert one.prompt == two.prompt
        assert all((one.frame(k) == two.frame(k)).all() for k in (0, 7, 63))
    assert len({make_world(seed).prompt for seed in SEEDS}) > 30


def test_frame_is_the_picture_of_its_ids():
    video = make_world(1)
    picture = video.frame(5)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    ids = video.frame_ids(5)
    assert (picture[8:12, 20:24] == palette().patches[ids[2, 5]]).all()
    with pytest.raises(ValueError, match="must not be negative"):
        video.frame_ids(-1)


def test_objects_move_one_token_and_bounce_at_the_walls():
    turns = 0
    for seed in SEEDS:
        video = make_world(seed)
        for i, obj in enumerate(video.objects):
            columns = [video.position(i, k)[0] for k in range(65)]
            steps = np.diff(columns)
            assert set(np.abs(steps)) == {1}
            assert min(columns) == 1
            assert max(columns) == GRID - 1 - OBJECT_CELLS
            for k in np.flatnonzero(np.diff(steps)) + 1:
                assert columns[k] in (1, GRID - 1 - OBJECT_CELLS)
                turns += 1
            assert all((obj.direction(k) == "right") == (steps[k] == 1) for k in range(64))
    assert turns > 100


def test_objects_are_hidden_for_three_to_six_frames():
    lengths = set()
    for seed in SEEDS:
        video = make_world(seed)
        for i in range(len(video.objects)):
            hidden = np.array([video.hidden(i, k) for k in range(65)])
            assert not hidden[0]
            assert all((len(video.object_cells(i, k)) == 0) == hidden[k] for k in range(65))
            assert hidden.any() == (video.pillar is not None)
            edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden, [0]])))
            # The last stretch may be cut by the end of the range looked at.
            lengths |= {int(b - a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b < len(hidden)}
    assert lengths == {3, 4, 5, 6}


def test_objects_come_out_as_they_went_in():
    for seed in SEEDS:
        video = make_world(seed)
        for i, obj in enumerate(video.objects):
            whole = palette().objects[obj.shape, obj.colour, video.scene]
            for k in range(33):
                cells = video.object_cells(i, k)
                x, y = video.position(i, k)
                assert (whole[cells[:, 0] - y, cells[:, 1] - x] == cells[:, 2]).all()
                assert (video.frame_ids(k)[cells[:, 0], cells[:, 1]] == cells[:, 2]).all()


def test_what_does_not_move_never_changes():
    for seed in SEEDS:
        video = make_world(seed)
        for k in range(33):
            still = np.ones((GRID, GRID), bool)
            for i in range(len(video.objects)):
                cells = video.object_cells(i, k)
                still[cells[:, 0], cells[:, 1]] = False
            assert (video.frame_ids(k) == video.background)[still].all()


def test_preview_is_written(tmp_path, monkeypatch):
    out = tmp_path / "preview.gif"
    monkeypatch.setattr("sys.argv", ["world", "--seed", "3", "--frames", "2", "--out", str(out)])
    world.main()
    assert out.stat().st_size > 500


def test_worlds_are_those_that_the_models_were_trained_on():
    shown = [make_world(seed, photo_share).frame_ids(5) for seed in range(20) for photo_share in (0, 1)]
    assert hashlib.sha256(np.stack(shown).astype(np.int64).tobytes()).hexdigest()[:16] == "e2c88c34afa52da6"


def test_a_film_goes_on_where_a_scene_was_left():
    film = make_film(3, (3, 5, 9))
    first, second = film.scenes
    assert first != second
    expected = [*((first, k) for k in (0, 1, 2)), *((second, k) for k in (0, 1)), *((first, k) for k in (3, 4, 5, 6))]
    expected += [(second, k) for k in range(2, 8)]
    for k, (scene, time) in enumerate(expected):
        assert (film.frame_ids(k) == scene.frame_ids(time)).all()
    assert [k for k in range(15) if film.returns(k)] == [5, 9]
    assert film.prompt == first.prompt
    assert make_film(3, (3, 5, 9)) == film != make_film(4, (3, 5, 9))


def test_what_an_object_has_always_covered_is_not_known():
    unknown = 0
    for seed in SEEDS:
        film = make_film(seed, (3, 5))
        scene = film.scenes[0]
        for row, column in np.argwhere(~film.known(5)):
            unknown += 1
            assert scene.frame_ids(3)[row, column] == scene.background[row, column]
            assert all(scene.frame_ids(k)[row, column] != scene.background[row, column] for k in range(3))
    # An object three tokens wide that has moved three frames uncovers what it covered in the first frame and the last.
    assert unknown > len(SEEDS) / 2
