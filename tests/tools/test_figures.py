"""Pictures: the same figure is the same file, of the kind that its name says."""

import pytest

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.tools.figures import FORMATS, QUICK, check_format, new_figure, save


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_figure_is_the_same_file(tmp_path, suffix):
    written = []
    for folder in ("first", "second"):
        figure = new_figure(3, 2)
        figure.subplots().plot([1, 3, 2])
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"picture{suffix}"
        save(figure, path)
        written.append(path.read_bytes())

    assert written[0] == written[1]
    assert written[0].lstrip().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_a_quick_run_says_so_in_its_picture(tmp_path):
    for quick in (False, True):
        figure = new_figure(3, 2)
        save(figure, tmp_path / "picture.svg", quick=quick)
        assert [text.get_text() for text in figure.texts] == [QUICK] * quick


def test_other_kinds_are_refused_before_there_is_something_to_draw(tmp_path):
    check_format("--plot", None)
    check_format("--plot", tmp_path / "a.PNG")
    with pytest.raises(ConfigError, match=r"--plot must name a file that ends in \.png or \.svg, not 'a\.pdf'"):
        check_format("--plot", tmp_path / "a.pdf")
