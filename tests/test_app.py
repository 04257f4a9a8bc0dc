"""examples/app.py: its API through gradio_client, its page in a real browser."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image
from tiny import free_port, photo, read

from predict import Parser

pytestmark = pytest.mark.skipif(not find_spec("gradio"), reason="needs gradio")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def address(parser: Parser):
    """The address of the page, served by a thread of this process."""
    from examples import app
    page = app.build(parser)
    _, address, _ = page.launch(server_port=free_port(), prevent_thread_lock=True, show_error=True, quiet=True)
    yield address
    page.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """The path of a photo with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(50, 70)).save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def test_the_label_map_is_predict_pys(parser: Parser, address: str, picture: Path, tmp_path: Path):
    from gradio_client import Client, handle_file
    client, label = Client(address, verbose=False, download_files=tmp_path / "got"), parser.parse(picture)
    shown, file = client.predict(handle_file(picture), api_name="/parse")
    assert (read(file) == label).all() and label.shape == (70, 50)
    assert {part["label"] for part in shown["annotations"]} == {parser.classes[k] for k in np.unique(label) if k}
    (tmp_path / "text.png").write_text("not an image")
    for bad in ("text.png", "truncated.png"):
        (tmp_path / "truncated.png").write_bytes(picture.read_bytes()[:900])
        with pytest.raises(Exception, match="(?i)image|photo|cut off"):
            client.submit(handle_file(tmp_path / bad), api_name="/parse").result(timeout=60)
    assert (read(client.predict(handle_file(picture), api_name="/parse")[1]) == label).all()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_shows_the_classes_and_asks_no_other_host(parser: Parser, address: str, picture: Path):
    sync_api = pytest.importorskip("playwright.sync_api")
    names = [parser.classes[k] for k in np.unique(parser.parse(picture)) if k]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, requests = browser.new_page(), []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.set_input_files("input[type=file]", picture)
        for name in names:
            page.get_by_text(name, exact=True).first.wait_for(timeout=60_000)
        browser.close()
    hosts = {urlparse(url).netloc for url in requests if urlparse(url).scheme in ("http", "https", "ws")}
    assert hosts == {urlparse(address).netloc}
