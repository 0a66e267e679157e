"""Pictures: the same figure is the same file, of the kind that its name says."""

import pytest

from vllm_packcache.config import ConfigError
from vllm_packcache.figures import FORMATS, check_format, new_figure, save


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


def test_other_kinds_are_refused_before_there_is_something_to_draw(tmp_path):
    check_format("--plot", None)
    check_format("--plot", tmp_path / "a.PNG")
    with pytest.raises(ConfigError, match=r"--plot must name a file that ends in \.png or \.svg, not 'a\.pdf'"):
        check_format("--plot", tmp_path / "a.pdf")
