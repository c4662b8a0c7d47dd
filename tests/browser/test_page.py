"""The page in Chromium, in front of the fake fleet: what a person does, sees and hears."""

import base64
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from playwright.sync_api import Browser, FilePayload, Locator, Page, Route, expect

from actors.images import encode_jpeg
from actors.schemas import Death, Detection, Gallery, ImageResult, JobCounts, JobReport, Sampled
from deploy.api import create_api
from deploy.keys import fresh_key
from deploy.settings import AuthSettings, HttpLimits
from tests.browser.conftest import needs_chromium
from tests.conftest import picture, video
from tests.http.conftest import OneDetectorFleet, listening

needs_chromium()
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

RED = picture(320, 240, blue=2)  # FakeModel: one "two" with confidence 0.784, in the inner half


@pytest.fixture
def opened(page: Page, address: str) -> Page:
    page.goto(address)
    return page


@pytest.fixture
def restored(fleet: OneDetectorFleet) -> Iterator[OneDetectorFleet]:
    replicas, deaths = fleet.replicas, fleet.deaths
    yield fleet
    fleet.replicas, fleet.deaths, fleet.submitted, fleet.galleries = replicas, deaths, None, {}


def upload(page: Page, name: str = "red.png", data: bytes = RED, media_type: str = "image/png") -> None:
    page.get_by_label("Choose images").set_input_files({"name": name, "mimeType": media_type, "buffer": data})


def results(page: Page) -> Locator:
    return page.get_by_role("table", name="Results").locator("tbody tr")


def give(page: Page, event: str, kind: str) -> None:
    """Let the page receive the red picture by a drop or from the clipboard."""
    page.evaluate(
        """([encoded, event, kind]) => {
            const bytes = Uint8Array.from(atob(encoded), (each) => each.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "given.png", {type: "image/png"}));
            const init = {bubbles: true, cancelable: true, [kind]: data};
            const made = event === "drop" ? new DragEvent(event, init) : new ClipboardEvent(event, init);
            document.getElementById("image").dispatchEvent(made);
        }""",
        [base64.b64encode(RED).decode(), event, kind],
    )


def colour_at(page: Page, x: int, y: int) -> list[int]:
    found: list[int] = page.evaluate(
        "([x, y]) => [...document.getElementById('picture').getContext('2d').getImageData(x, y, 1, 1).data]", [x, y]
    )
    return found[:3]


def test_an_image_is_drawn_and_listed(opened: Page) -> None:
    upload(opened)
    expect(results(opened)).to_have_text(["two0.78480,60 240,60 240,180 80,180"])
    expect(opened.get_by_role("img", name="red.png with 1 two")).to_be_visible()
    assert colour_at(opened, 10, 200) == [200, 0, 2]
    assert colour_at(opened, 80, 150) != [200, 0, 2]  # the box's left edge


def test_the_sliders_ask_again(opened: Page) -> None:
    upload(opened)
    expect(results(opened)).to_have_count(1)
    opened.get_by_label("Confidence").fill("0.9")
    expect(opened.locator("#image-summary")).to_contain_text("nothing found")
    opened.get_by_label("Confidence").press("Home")
    expect(results(opened)).to_have_count(1)


def test_an_answer_that_comes_too_late_is_not_shown(opened: Page) -> None:
    upload(opened)
    expect(results(opened)).to_have_count(1)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    opened.route("**/predict", hold, times=1)
    with opened.expect_request("**/predict"):
        opened.get_by_label("Confidence").fill("0.95")
    with opened.expect_response("**/predict"):
        opened.get_by_label("Confidence").fill("0.3")
    held[0].continue_()
    expect(results(opened)).to_have_count(1)
    expect(opened.locator("#image-summary")).to_contain_text("1 two")


@pytest.mark.parametrize(("event", "kind"), [("drop", "dataTransfer"), ("paste", "clipboardData")])
def test_images_are_dropped_and_pasted(opened: Page, event: str, kind: str) -> None:
    give(opened, event, kind)
    expect(opened.get_by_role("img", name="given.png with 1 two")).to_be_visible()


def test_one_click_tries_the_sample(opened: Page) -> None:
    opened.get_by_role("button", name="Try the sample").click()
    expect(opened.locator("#image-summary")).to_contain_text("640 x 480 pixels")


def test_several_images_are_chosen_between(opened: Page) -> None:
    files = [FilePayload(name=f"{blue}.png", mimeType="image/png", buffer=picture(blue=blue)) for blue in (0, 1)]
    opened.get_by_label("Choose images").set_input_files(files)
    expect(results(opened)).to_contain_text(["zero"])
    opened.get_by_role("button", name="1.png").click()
    expect(results(opened)).to_contain_text(["one"])


def test_a_wrong_file_gets_a_clear_sentence(opened: Page, complaints: list[str]) -> None:
    upload(opened, "notes.txt", b"not a picture", "text/plain")
    expect(opened.get_by_role("alert")).to_contain_text("notes.txt: ")
    expect(opened.get_by_role("table", name="Results")).to_be_hidden()
    assert len(complaints) == 1 and "400" in complaints.pop()
    upload(opened)
    expect(opened.get_by_role("alert")).to_be_hidden()


def test_a_video_is_sent_to_its_own_view(opened: Page, tmp_path: Path) -> None:
    upload(opened, "clip.mp4", video(tmp_path / "clip.mp4"), "video/mp4")
    expect(opened.get_by_role("alert")).to_have_text("clip.mp4 is a video: open it in the view 'Camera or video'.")


def test_a_request_is_copied(opened: Page, address: str) -> None:
    upload(opened)
    opened.get_by_role("button", name="Copy as curl").click()
    expect(opened.get_by_text("Copied.")).to_be_visible()
    copied = opened.evaluate("navigator.clipboard.readText()")
    assert copied == f"curl -F 'file=@red.png' -F conf=0.25 -F iou=0.7 -F model=fake {address}/predict"
    opened.get_by_role("button", name="Copy JSON").click()
    expect(opened.get_by_label("What was copied")).to_contain_text('"name": "two"')


def test_the_tabs_are_worked_by_keyboard(opened: Page) -> None:
    opened.get_by_role("tab", name="Image").focus()
    for key, name, panel in [
        ("ArrowRight", "Camera or video", "Use the camera"),
        ("End", "Jobs", "No job has told of itself"),
        ("ArrowRight", "Image", "Try the sample"),
        ("ArrowLeft", "Jobs", "No job has told of itself"),
        ("Home", "Image", "Try the sample"),
    ]:
        opened.keyboard.press(key)
        expect(opened.get_by_role("tab", name=name)).to_be_focused()
        expect(opened.get_by_role("tab", selected=True)).to_have_text(name)
        expect(opened.get_by_role("tabpanel")).to_contain_text(panel)
    opened.keyboard.press("End")
    opened.reload()
    expect(opened.get_by_role("tab", selected=True)).to_have_text("Jobs")


def test_a_screen_reader_finds_names_and_roles(opened: Page) -> None:
    upload(opened)
    expect(results(opened)).to_have_count(1)
    expect(opened.locator("body")).to_match_aria_snapshot("""
        - banner:
          - heading "yolofleet" [level=1]
          - tablist "Views":
            - tab "Image" [selected]
            - tab "Camera or video"
            - tab "Fleet"
            - tab "Jobs"
          - combobox "Model":
            - option "fake (detect, fake)" [selected]
          - link "API"
        - main:
          - tabpanel "Image":
            - button "Choose images"
            - button "Try the sample"
            - slider "Confidence"
            - slider "Overlap"
            - img "red.png with 1 two"
            - status: /1 two/
            - table "Results":
              - rowgroup:
                - row "Class Confidence Where"
              - rowgroup:
                - row /two/:
                  - rowheader "two"
        """)


def test_the_fleet_is_seen_and_a_death_as_it_happens(opened: Page, restored: OneDetectorFleet, artefacts: Path) -> None:
    opened.get_by_role("tab", name="Fleet").click()
    rows = opened.get_by_role("table", name="Replicas of fake").locator("tbody tr")
    expect(rows).to_have_text(
        ["oneRUNNING10.0.0.10.5 CPU, 0.25 GPU300 MBnone1 2", "twoSTARTINGunknown0.5 CPU, 0.25 GPUunknownunknownunknown"]
    )
    one, two = restored.replicas
    restored.deaths = (Death("a1", "10.0.0.1", 1e9),)
    restored.replicas = (replace(one, state="DEAD"), replace(two, state="RUNNING"))
    log = opened.get_by_role("log", name="What changed")
    expect(log).to_contain_text("fake: a replica died on 10.0.0.1")
    expect(log).to_contain_text("fake: replica one was RUNNING, is DEAD")
    expect(log).to_contain_text("fake: replica two was STARTING, is RUNNING")
    opened.screenshot(path=artefacts / "fleet.png")
    restored.replicas = (two,)
    expect(log).to_contain_text("fake: replica one is gone")


def test_the_last_minute_shows_answers_and_errors(opened: Page, complaints: list[str]) -> None:
    upload(opened, "notes.txt", b"not a picture", "text/plain")
    expect(opened.get_by_role("alert")).to_be_visible()
    complaints.clear()
    upload(opened)
    expect(results(opened)).to_have_count(1)
    opened.get_by_role("tab", name="Fleet").click()
    expect(opened.get_by_role("article", name="fake")).to_contain_text("bad_image")


def test_the_camera_is_tracked(opened: Page, artefacts: Path) -> None:
    opened.get_by_role("tab", name="Camera or video").click()
    opened.get_by_role("button", name="Use the camera").click()
    expect(opened.get_by_role("img", name="The latest frame, with 1 objects")).to_be_visible(timeout=60_000)
    expect(
        opened.get_by_role("table", name="Counts").locator("tbody tr").filter(has_text=re.compile("[1-9]$"))
    ).not_to_have_count(0)
    expect(opened.locator("#answered")).to_have_text(re.compile(r"\d{2,}"), timeout=60_000)
    expect(opened.get_by_role("table", name="The fleet at work").locator("tbody tr")).to_have_count(2)
    count_at_a_line_and_a_zone(opened)
    opened.screenshot(path=artefacts / "stream.png")
    opened.get_by_role("button", name="Stop").click()
    expect(opened.get_by_text("Stopped.")).to_be_visible()


def count_at_a_line_and_a_zone(opened: Page) -> None:
    """The object stays in the middle: a line that is moved over it is passed, and a zone around it has it inside."""
    passed = opened.get_by_role("table", name="Lines and zones").locator("tbody tr")
    opened.get_by_role("button", name="Add a line").click()
    expect(passed).to_have_text([re.compile("line 1")], timeout=60_000)  # supervision is imported now
    point = opened.get_by_role("button", name="line 1, point 1 of 2")
    expect(point).to_be_focused()
    before = point.get_attribute("aria-label")
    opened.keyboard.press("ArrowLeft")
    expect(point).not_to_have_attribute("aria-label", before or "")
    expect(point).to_be_focused()
    opened.get_by_role("button", name="Add a zone").click()
    expect(passed.nth(1)).to_have_text(re.compile("zone 2.*1 (zero|one|two|three)$"))
    corner = opened.get_by_role("button", name="zone 2, point 1 of 4")
    corner.hover()
    opened.mouse.down()
    opened.mouse.move(*(side + 40 for side in corner_of(corner)))
    opened.mouse.up()
    streams = opened.request.get(f"{opened.url.partition('#')[0]}streams")
    (regions,) = [stream["regions"] for stream in streams.json()["streams"] if stream["stream"].startswith("page-")]
    assert set(regions["lines"]) == {"line 1"} and set(regions["zones"]) == {"zone 2"}
    opened.get_by_role("button", name="Remove them").click()
    expect(passed).to_have_count(0)
    opened.get_by_role("button", name="Add a line").click()
    expect(passed).to_have_text([re.compile("line 3")])


def corner_of(handle: Locator) -> tuple[float, float]:
    box = handle.bounding_box()
    assert box
    return box["x"], box["y"]


def webm(path: Path, frames: int = 12) -> bytes:
    """A red clip as Chromium plays it: VP8."""
    with av.open(path, "w") as out:
        stream = out.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        image = np.full((48, 64, 3), (0, 0, 200), np.uint8)
        for _ in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        out.mux(stream.encode())
    return path.read_bytes()


def test_a_video_file_is_tracked_to_its_end(opened: Page, tmp_path: Path) -> None:
    opened.get_by_role("tab", name="Camera or video").click()
    opened.get_by_label("Frames").select_option("all of them")
    clip = FilePayload(name="clip.webm", mimeType="video/webm", buffer=webm(tmp_path / "clip.webm"))
    opened.get_by_label("Choose a video").set_input_files(clip)
    expect(opened.get_by_text("The video has ended.")).to_be_visible(timeout=60_000)
    expect(opened.locator("#answered")).to_have_text(re.compile("[1-9]"))
    expect(opened.get_by_role("table", name="Counts").locator("tbody tr")).to_have_text([re.compile("11$")])


def test_a_video_that_cannot_be_played_is_said_so(opened: Page) -> None:
    opened.get_by_role("tab", name="Camera or video").click()
    clip = FilePayload(name="clip.mp4", mimeType="video/mp4", buffer=b"no video")
    opened.get_by_label("Choose a video").set_input_files(clip)
    expect(opened.get_by_role("alert")).to_contain_text("cannot play that file")


def test_what_is_said_while_the_fleet_is_asked_for_its_streams_stays(opened: Page) -> None:
    asked: list[Route] = []
    opened.route("**/streams", lambda route: asked.append(route))  # noqa: PLW0108 - Playwright marks what it calls
    opened.get_by_role("tab", name="Camera or video").click()
    test_a_video_that_cannot_be_played_is_said_so(opened)
    with opened.expect_response("**/streams") as response:
        asked[0].continue_()
    response.value.finished()
    opened.evaluate("() => new Promise(requestAnimationFrame)")
    expect(opened.get_by_role("alert")).to_contain_text("cannot play that file")


def test_a_fleet_without_streams_says_so(opened: Page, complaints: list[str]) -> None:
    opened.route("**/streams", lambda route: route.fulfill(status=404, json={}))
    opened.get_by_role("tab", name="Camera or video").click()
    expect(opened.get_by_role("alert")).to_have_text("This fleet has no streams: images only.")
    expect(opened.get_by_role("button", name="Use the camera")).to_be_disabled()
    assert len(complaints) == 1 and "404" in complaints.pop()


def test_jobs_are_listed_with_their_progress_and_a_gallery(opened: Page, restored: OneDetectorFleet, artefacts: Path) -> None:
    box = (20.0, 10.0, 50.0, 40.0)
    result = ImageResult(64, 48, "detect", (Detection(0, "nut", 0.9, box),))
    samples = (Sampled("a.png", encode_jpeg(np.full((48, 64, 3), 90, np.uint8)), result), Sampled("gone.png", None, result))
    letter = {"uri": "/data/cut.jpg", "stage": "decode", "reason": "The image is truncated"}
    restored.submitted = [
        JobReport("job-1", "RUNNING", "yolofleet predict photos", 1e9, None, "", "/data/out", JobCounts(200, 40, 60, 3)),
        JobReport("job-0", "FAILED", "yolofleet predict old", 1e9, 1e9 + 60, "its driver ended"),
    ]
    restored.galleries = {"job-1": Gallery(samples, (letter,))}
    opened.get_by_role("tab", name="Jobs").click()
    expect(opened.get_by_text("2 jobs, 1 running.")).to_be_visible()
    running, failed = opened.get_by_role("article", name="job-1"), opened.get_by_role("article", name="job-0")
    expect(running).to_contain_text("Inputs100 of 200Dead letters3")
    expect(running.get_by_role("progressbar")).to_have_attribute("value", "100")
    expect(failed).to_contain_text("its driver ended")
    expect(failed.get_by_role("button")).to_be_hidden()
    running.get_by_role("button", name="Show results").click()
    expect(running.get_by_role("img", name="a.png with nut")).to_be_visible()
    expect(running).to_contain_text("Its input cannot be read any more.")
    expect(running.get_by_role("table", name="Some dead letters")).to_contain_text("/data/cut.jpgdecodeThe image is truncated")
    opened.screenshot(path=artefacts / "jobs.png", full_page=True)
    restored.submitted = [replace(restored.submitted[0], counts=JobCounts(200, 40, 160, 3))]
    expect(running.get_by_role("progressbar")).to_have_attribute("value", "200")
    expect(running.get_by_role("img", name="a.png with nut")).to_be_visible()
    running.get_by_role("button", name="Hide results").click()
    expect(running.get_by_role("img", name="a.png with nut")).to_be_hidden()


def test_a_key_is_asked_for_once(page: Page, fleet: OneDetectorFleet, tmp_path: Path, complaints: list[str]) -> None:
    key, line = fresh_key("somebody")
    (tmp_path / "keys").write_text(f"{line}\n")
    with listening(create_api(fleet, HttpLimits(), AuthSettings(keys_file=str(tmp_path / "keys")))) as address:
        page.goto(address)
        page.get_by_role("textbox", name="API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("textbox", name="API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("combobox", name="Model")).to_have_text("fake (detect, fake)")
        upload(page)
        expect(results(page)).to_have_count(1)
        assert page.evaluate("Object.keys(localStorage).length") == 0
    assert all("401" in complaint for complaint in complaints)
    complaints.clear()


def test_what_the_page_loads_is_its_own_and_may_be_kept(opened: Page, address: str) -> None:
    answers = [opened.request.get(f"{address}/{path}") for path in ("", "web/app.js", "web/style.css", "web/sample.jpg")]
    for answer in answers:
        assert answer.ok and "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-cache"
        again = opened.request.get(answer.url, headers={"if-none-match": answer.headers["etag"]})
        assert again.status == 304
    assert opened.request.get(f"{address}/web/../api/fleet.py").status == 404


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_by_day_and_by_night(browser: Browser, address: str, artefacts: Path, scheme: str) -> None:
    with ExitStack() as leave:
        context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
        leave.callback(context.close)
        page = context.new_page()
        page.goto(address)
        page.get_by_role("button", name="Try the sample").click()
        expect(page.get_by_role("img", name="sample.jpg")).to_be_visible()
        page.screenshot(path=artefacts / f"image-{scheme}.png")
        assert page.evaluate(CONTRAST) >= 7
        page.set_viewport_size({"width": 390, "height": 844})  # a telephone's: nothing has to be scrolled sideways
        for view in ("Image", "Camera or video", "Fleet", "Jobs"):
            page.get_by_role("tab", name=view).click()
            assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.get_by_role("tab", name="Image").click()
        page.screenshot(path=artefacts / f"narrow-{scheme}.png")


CONTRAST = """() => {
    const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
        .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
    const {color, backgroundColor} = getComputedStyle(document.body);
    const [low, high] = [light(color), light(backgroundColor)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""
